"""Preference pairs with checkable answers, and a short training on them."""

import json
from pathlib import Path
from typing import Any

from cordee.stage import Context
from posttrain import dpo

ANSWERS = ("German", "French", "Italian", "Romansh")


def pair(number: int) -> dict[str, Any]:
    """A question with a right and a wrong answer."""
    question = f"Which language is this? {'Tuots umans naschan libers. ' * (1 + number % 3)}{number}"
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": ANSWERS[number % 2]}],
        "rejected": [{"role": "assistant", "content": ANSWERS[2 + number % 2]}],
    }


def config(model: Path, data: Path, **changes: Any) -> dpo.Config:
    """Six steps of eight pairs."""
    trainer = {"learning_rate": 5e-3, "num_train_epochs": 2, "max_length": 128, "bf16": False}
    values = {
        "model": str(model),
        "data": [{"path": str(data)}],
        "global_batch_size": 8,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": [3, 5],
        "resume_steps": 2,
        "lora": {"r": 4, "lora_alpha": 8},
        **changes,
        "trainer": {**trainer, **changes.get("trainer", {})},
    }
    return dpo.Config.model_validate(values)


def metrics_of(context: Context) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (context.out / "metrics.jsonl").read_text().splitlines()]
