"""The completions that are kept in `completions.jsonl`, one a line: all that are trained on, some of those held out."""

import math
from collections.abc import Iterator
from typing import Any

from posttrain.rewards.opening import total

HELDOUT_KEPT = 8
"""Completions of held-out prompts that are kept of each batch."""


def rows(trainer: Any, count: int, step: int, *, is_heldout: bool) -> list[dict[str, Any]]:
    """The last `count` completions of all processes, which are first trained on in `step`.

    A row has `step`, `prompt` and `completion` (messages or texts), `rewards` by name (null where one does not apply),
    `reward` (their weighted sum), and `advantage`; `heldout` says that nothing is trained on it.
    """
    if not trainer.accelerator.is_main_process:
        return []
    logs, names = trainer._logs, trainer.reward_func_names  # noqa: SLF001 - TRL keeps them nowhere else
    weights = dict(zip(names, trainer.reward_weights.tolist(), strict=True))
    found = []
    shown = zip(
        _last(logs["prompt"], count), _last(logs["completion"], count), _last(logs["advantages"], count),
        zip(*(_last(logs["rewards"][name], count) for name in names), strict=True), strict=True,
    )  # fmt: skip
    for prompt, completion, advantage, values in shown:
        row = {"step": step, "prompt": prompt, "completion": completion}
        named = zip(names, values, strict=True)
        row["rewards"] = {name: None if math.isnan(value) else value for name, value in named}
        row["reward"] = total(row["rewards"], weights)
        found.append(row | ({"heldout": True} if is_heldout else {"advantage": advantage}))
    return found[:HELDOUT_KEPT] if is_heldout else found


def _last(values: Any, count: int) -> Iterator[Any]:
    """The last so many of a deque."""
    return iter(list(values)[-count:])
