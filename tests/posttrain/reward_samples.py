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


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def notes(context: Context) -> list[str]:
    events = files.read_json_lines(context.events)
    return [event["text"] for event in events if event["event"] == "note"]
