"""Rows for every method that learns from given answers, and the keys of a short training on them."""

import importlib
import json
import random
from pathlib import Path
from typing import Any

from dpo_samples import ANSWERS, pair

METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"trainer": {"beta": 0.3}},
    "dpo aot": {"trainer": {"beta": 0.3, "loss_type": ["aot", "sft"]}},
    "dpo aot_unpaired": {"trainer": {"beta": 0.3, "loss_type": ["aot_unpaired"]}},
    "dpo weighted": {"trainer": {"loss_type": ["sigmoid_norm", "apo_zero"], "use_weighting": True, "ld_alpha": 0.5}},
    "kto": {"trainer": {"beta": 0.3, "desirable_weight": 1.5}},
    "kto apo_zero_unpaired": {"trainer": {"loss_type": "apo_zero_unpaired"}},
    "orpo": {"trainer": {"beta": 0.3}},
    "cpo": {"trainer": {"beta": 0.3}},
    "cpo simpo": {"trainer": {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0}},
    "qrpo": {},
    "qrpo by length": {"beta": 1.0, "length_normalization": True, "transform": "log"},
}
"""By the stage and a variant of it: keys."""


def write_rows(file: Path, count: int = 24) -> Path:
    """Pairs with answers of many lengths, their rewards and those of a reference's own answers."""
    drawn, rows = random.Random(3), []  # noqa: S311 - sample data
    for n in range(count):
        row = pair(n)
        row["chosen"][0]["content"] += f" {ANSWERS[n % 4]}" * (n % 5)
        row["rejected"][0]["content"] += " naschan libers" * (n % 4)
        row |= {"chosen_reward": 1 + drawn.random(), "rejected_reward": drawn.random()}
        rows.append(row | {"reference_rewards": sorted(2 * drawn.random() for _ in range(4 + n % 3))})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def stage_of(method: str) -> Any:
    """The stage's module."""
    return importlib.import_module(f"posttrain.{method.partition(' ')[0]}")


def keys_of(method: str, model: Path, file: Path, **given: Any) -> dict[str, Any]:
    """Three steps of eight rows."""
    own = METHODS[method]
    trainer = {"max_steps": 3, "max_length": 128, "learning_rate": 0.05, "optim": "sgd", "bf16": False}
    trainer |= {**own.get("trainer", {}), **given.pop("trainer", {})}
    values = {"model": str(model), "data": [{"path": str(file)}], "global_batch_size": 8, "compile": "off"}
    return values | {key: value for key, value in own.items() if key != "trainer"} | given | {"trainer": trainer}
