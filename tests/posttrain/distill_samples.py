"""The keys of a short distillation."""

from pathlib import Path
from typing import Any

from posttrain import distill


def config(model: Path, teacher: Path, chats: Path, **changes: Any) -> distill.Config:
    """Six steps of eight chats."""
    trainer = {"learning_rate": 5e-3, "num_train_epochs": 3, "max_length": 128, "bf16": False}
    values = {
        "model": str(model),
        "teacher": str(teacher),
        "data": [{"path": str(chats)}],
        "global_batch_size": 8,
        "per_device_train_batch_size": 4,
        "resume_steps": 2,
        "compile": "off",
        **({"max_new_tokens": 8} if changes.get("on_policy") else {}),
        **changes,
        "trainer": {**trainer, **changes.get("trainer", {})},
    }
    return distill.Config.model_validate(values)
