"""A recipe over several values of its keys: its variants, and what came of each."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee import files, plan, recipe
from cordee.artifact import Artifact, Store
from cordee.errors import UserError
from cordee.plan import Plan
from cordee.recipe import Recipe

FIGURES = ("heldout_bits_per_byte", "heldout_loss", "heldout_reward", "loss")
"""What is shown of a training: the first of these metrics that it has."""


@dataclass(frozen=True)
class Variant:
    """A recipe with one value for each of the keys."""

    values: tuple[str, ...]
    recipe: Recipe

    def plan(self, store: Store) -> Plan:
        """What of it is done now; what variants share is made once."""
        return plan.make(self.recipe, store)


def variants(file: Path, overrides: Sequence[str], over: Sequence[str], *, in_step: bool = False) -> list[Variant]:
    """All variants of a recipe; every key of each is checked.

    Args:
        file: the recipe.
        overrides: `stage.key=value`, the same for all.
        over: `stage.key=value,value,…`; a value that is a list has brackets: `dpo.trainer.loss_type=[sigmoid],[ipo]`.
        in_step: whether the first values of all keys make a variant, the second ones another, and so on, instead of
            each value of one key with each of the others.

    Raises:
        UserError: a variant is wrong, or the values can't be combined.
    """
    keys, values = zip(*map(_values, over), strict=True)
    if in_step and len({len(one) for one in values}) > 1:
        counts = ", ".join(f"{key} has {len(one)}" for key, one in zip(keys, values, strict=True))
        raise UserError(f"all keys need as many values: {counts}", file="command line", key="--in-step")
    found = []
    for chosen in zip(*values, strict=True) if in_step else itertools.product(*values):
        told = [f"{key}={json.dumps(value)}" for key, value in zip(keys, chosen, strict=True)]
        found.append(Variant(tuple(map(_shown, chosen)), recipe.load(file, [*overrides, *told])))
    return found


def _values(over: str) -> tuple[str, list[Any]]:
    """A key and its values."""
    key, equals, text = over.partition("=")
    found = recipe.parse_value(key, f"[{text}]") if equals else None
    if not found:
        raise UserError(f"{over!r} is no key=value,value", file="command line", key="--over")
    if len({json.dumps(value) for value in found}) < len(found):
        raise UserError("has a value twice", file="command line", key=key)
    return key, found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def results(found: Sequence[Plan], asked: Sequence[str] = ()) -> tuple[list[str], list[list[float | None]]]:
    """The figures of variants: their names, and for each variant a value of each; None where it has none.

    Args:
        found: the plan of each variant.
        asked: `stage.metric`; if there are none, those of each stage that differs between variants: a training's
            held-out figure or its loss, and what a report says of models on the main metric of each task.
    """
    told = [dict(_metrics(one)) if asked else dict(_figures(one, _differing(found))) for one in found]
    names = list(asked) or list(dict.fromkeys(name for one in told for name in one))
    return names, [[one.get(name) for name in names] for one in told]


def _differing(found: Sequence[Plan]) -> set[str]:
    """The stages that are not the same in all variants."""
    fingerprints: dict[str, set[str]] = {}
    for one in found:
        for planned in one.stages:
            fingerprints.setdefault(planned.name, set()).add(planned.fingerprint)
    return {name for name, kinds in fingerprints.items() if len(kinds) > 1}


def _metrics(found: Plan) -> Iterator[tuple[str, float]]:
    for planned in found.stages:
        for name, value in _numbers(planned.artifact).items():
            yield f"{planned.name}.{name}", value


def _numbers(made: Artifact | None) -> dict[str, float]:
    metrics = made.manifest.metrics if made else {}
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _figures(found: Plan, stages: set[str]) -> Iterator[tuple[str, float]]:
    for planned in found.stages:
        if planned.name not in stages or not planned.artifact:
            continue
        numbers = _numbers(planned.artifact)
        if name := next((name for name in FIGURES if name in numbers), None):
            yield f"{planned.name}.{name}", numbers[name]
        report = planned.artifact.path / "report.json"
        for table in files.read_json(report)["benchmarks"] if report.is_file() else ():
            if table["is_main"]:
                for row in table["rows"]:
                    yield f"{table['task']} {row['model']}", row["value"]
