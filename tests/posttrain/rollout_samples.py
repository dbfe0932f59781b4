"""Prompts with checkable answers, rewards in TRL's calling convention, and a short training on them."""

import json
import re
from pathlib import Path
from typing import Any

from cordee.stage import Context
from posttrain import grpo, rloo

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def said(completion: Any) -> str:
    """The text of a completion."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def number_match(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """1 where the last number of a completion is that of GSM8K's `answer`, behind its `####`."""
    wanted = [None if one is None else str(one).rpartition("####")[2].strip().replace(",", "") for one in answer]
    found = [(NUMBER.findall(said(one)) or [""])[-1].replace(",", "") for one in completions]
    return [None if want is None else float(have == want) for have, want in zip(found, wanted, strict=True)]


def of_some(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Below 0, and None where a completion begins with an even id."""
    firsts = [ids[0] for _, ids in zip(completions, completion_ids, strict=True)]
    return [-1.0 - first / 1000 if first % 2 else None for first in firsts]


def form(completions: list[Any], pattern: str, **_: Any) -> list[float | None]:
    """1 where a completion matches a pattern as a whole."""
    return [float(re.fullmatch(pattern, said(one), re.DOTALL) is not None) for one in completions]


def letters(completions: list[Any], wanted: str = "e", **_: Any) -> list[float | None]:
    """The share of a completion's characters that are a letter: something to learn in a few steps."""
    return [said(one).count(wanted) / max(len(said(one)), 1) for one in completions]


def by_ids(completion_ids: list[list[int]], below: int = 200, **_: Any) -> list[float | None]:
    """The share of tokens with small ids: differs between completions of a model with random weights."""
    return [sum(token < below for token in ids) / len(ids) for ids in completion_ids]


def broken(completions: list[Any], **_: Any) -> list[float | None]:
    """Fails."""
    del completions
    raise ValueError("no network")


def prompts(path: Path, count: int = 12) -> Path:
    """Questions, some without an answer."""
    rows = [
        {"prompt": f"How many are {n} and {n}?", "answer": f"They are #### {2 * n}" if n % 4 else None, "kind": "sum"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def keys(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Six steps of eight completions: two prompts with four each."""
    trainer = {
        "learning_rate": 5e-3, "max_steps": 6, "num_generations": 4, "max_completion_length": 12, "bf16": False,
    }  # fmt: skip
    return {
        "model": str(model),
        "data": [{"path": str(data)}],
        "rewards": [{"function": "rollout_samples:by_ids"}],
        "engine": "transformers",
        "precision": "float32",
        "global_batch_size": 8,
        "per_device_train_batch_size": 4,
        "resume_steps": 2,
        "lora": {"r": 4, "lora_alpha": 8},
        **changes,
        "trainer": {**trainer, **changes.get("trainer", {})},
    }


def config(model: Path, data: Path, **changes: Any) -> grpo.Config:
    return grpo.Config.model_validate(keys(model, data, **changes))


def rloo_config(model: Path, data: Path, **changes: Any) -> rloo.Config:
    return rloo.Config.model_validate(keys(model, data, **changes))


def lines(context: Context, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """What was written by the step, without what was measured in seconds."""
    found = [json.loads(line) for line in (context.out / name).read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith("_time")} for row in found]


def notes(context: Context) -> str:
    return context.events.read_text(encoding="utf-8")


def served(folder: Path, template: str) -> Path:
    """An Apertus model with random weights, large enough for vLLM's kernels."""
    import torch
    from chat_samples import make_tokenizer
    from transformers import ApertusConfig, ApertusForCausalLM, AutoTokenizer

    make_tokenizer(folder, template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    model = ApertusForCausalLM(
        ApertusConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **ids,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # so that other weights say other things
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|assistant_end|>")
    ]  # fmt: skip
    model.save_pretrained(folder)
    return folder
