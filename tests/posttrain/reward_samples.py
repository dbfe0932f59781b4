"""Answers with known rewards, and the keys of the stages that score and pair them."""

import json
from pathlib import Path
from typing import Any

from cordee import files
from cordee.stage import Context
from posttrain import pairs, score


def answer(number: int, said: str, right: str, **columns: Any) -> dict[str, Any]:
    """A row as `eval.generate` writes it."""
    messages = [{"role": "user", "content": f"What is {number} times 7?"}, {"role": "assistant", "content": said}]
    return {
        "messages": messages, "answer": right, "prompt_id": number, "model": "sft", "finish_reason": "stop",
        "special_tokens": 0, **columns,
    }  # fmt: skip


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def some_answers(path: Path, prompts: int = 6, samples: int = 4, **columns: Any) -> Path:
    """Of each prompt `samples` answers, of which the first `number % (samples + 1)` are right."""
    rows = [
        answer(number, f"It is {7 * number if sample < number % (samples + 1) else 1000 + sample}.", str(7 * number),
               sample=sample, **columns)
        for number in range(prompts) for sample in range(samples)
    ]  # fmt: skip
    return written(path, rows)


def score_config(file: Path, **changes: Any) -> score.Config:
    precision = {"precision": "float32"} if "reference" in changes else {}
    return score.Config.model_validate(
        {"data": [{"path": str(file)}], "rewards": [{"name": "correct", "function": "number_match"}],
         "batch_size": 2, **precision, **changes}
    )  # fmt: skip


def pairs_config(file: Path, **changes: Any) -> pairs.Config:
    return pairs.Config.model_validate({"data": [{"path": str(file)}], **changes})


def expected(model_folder: Path, row: dict[str, Any], count: int | None = None) -> tuple[float, int]:
    """The log-probability of a row's answer or of its first tokens, one by one from whole logits in float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()
    how = {"tokenize": True, "return_dict": False}
    prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, **how)
    whole = tokenizer.apply_chat_template(row["messages"], **how)
    assert whole[: len(prompt)] == prompt
    with torch.no_grad():
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    places = range(len(prompt), len(whole))[:count]
    return sum(float(logprobs[at - 1, whole[at]]) for at in places), len(places)


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def notes(context: Context) -> list[str]:
    events = files.read_json_lines(context.events)
    return [event["text"] for event in events if event["event"] == "note"]
