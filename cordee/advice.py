"""What to change where a stage has run out of memory, in numbers, by the estimate that its plan is made with."""

from collections.abc import Callable, Iterator
from typing import Any

from cordee import units
from cordee.config import Config
from cordee.cost import Cost
from cordee.errors import CordeeError

LEAST = 0.02
"""Of the memory: what saves less is not said."""


def on_memory(config: Config, cost: Cost, estimate: Callable[[dict[str, Any]], Cost] | None) -> str:
    """Which keys save memory, and how much of how much; empty where the stage can't say.

    Args:
        config: the stage's.
        cost: as it was planned.
        estimate: the cost with some keys changed.
    """
    said = [f"of {units.size(cost.memory_bytes)} that one process needs, {line}" if not place else line
            for place, line in enumerate(_lines(config, cost, estimate))]  # fmt: skip
    return ", ".join(said) or "give it more memory, or less to work on at once"


def _lines(config: Config, cost: Cost, estimate: Callable[[dict[str, Any]], Cost] | None) -> Iterator[str]:
    needed = cost.memory_bytes
    for key, changes, effect in _changes(config):
        try:
            less = estimate(changes).memory_bytes if estimate and needed else None
        except CordeeError:  # another key forbids it
            continue
        if needed and less and needed - less > LEAST * needed:
            yield f"{key} saves {units.size(needed - less)} ({effect})"
        elif not (needed and less):
            yield f"{key} saves some ({effect})"


def _changes(config: Config) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The keys that save memory, as they are written, what they change, and their effect."""
    rows = getattr(config, "per_device_train_batch_size", 1)
    fewer = next((size for size in range(rows // 2, 0, -1) if rows % size == 0), None)
    if fewer:
        name = "per_device_train_batch_size"
        yield f"{name}={fewer} instead of {rows}", {name: fewer}, "the result is the same"
    if getattr(config, "activation_checkpointing", None) == "none":
        changes: dict[str, Any] = {"activation_checkpointing": "full"}
        yield "activation_checkpointing=full", changes, "a step takes about a third longer; selective saves less"
    trainer = getattr(config, "trainer", None)
    if trainer is not None and not trainer.get("gradient_checkpointing"):
        changes = {"trainer": {**trainer, "gradient_checkpointing": True}}
        yield "trainer.gradient_checkpointing=true", changes, "a step takes about a third longer"
