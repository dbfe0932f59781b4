"""Compares the trainings of a proof: their samples, losses and weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cordee import files
from cordee.certificate import Check, at_least, at_most

CHANGE_LIMIT = {"float32": 1e-2, "bfloat16": 1e-1}
"""How far weights may be apart at another number of processes, as a share of how far training moved them.

Sums are then rounded in another order, and Adam divides each gradient by its own size, which makes the rounding of
those near zero as large as any step.
"""


@dataclass(frozen=True)
class Ended:
    """A training that has ended."""

    out: Path
    resumed_from: int = 0
    """The step from which it was resumed; 0 if it was not."""

    def rows(self) -> dict[int, dict[str, Any]]:
        """Its line of `metrics.jsonl` for each step."""
        found = files.read_json_lines(self.out / "metrics.jsonl")
        return {row["step"]: row for row in found if "samples" in row}

    @property
    def precision(self) -> str:
        """What its matrices were multiplied in."""
        return str(files.read_json(self.out / "training.json")["precision"])

    def weights(self, place: str = ".") -> dict[str, torch.Tensor]:
        """Its weights by name, float32, at the end or at a checkpoint."""
        return dict(load_file(self.out / place / "model.safetensors"))

    def shown(self) -> dict[str, Any]:
        """Its part of the certificate's evidence."""
        return {
            "weights_sha256": files.sha256(self.out / "model.safetensors"),
            "samples": [row["samples"] for row in self.rows().values()],
            "losses": [row["loss"] for row in self.rows().values()],
            "resumed_from_step": self.resumed_from,
        }


def other_processes(processes: int) -> int | None:
    """Another number of processes that this machine can run; None where it has a single accelerator."""
    if processes > 1:
        return 1
    return None if torch.cuda.device_count() == 1 else 2


def same_bits(one: Ended, other: Ended) -> list[Check]:
    """Checks that a resumed training equals the uninterrupted one in every bit."""
    first, second = one.weights(), other.weights()
    names = first.keys() | second.keys()
    differing = sum(name not in first or name not in second or not first[name].equal(second[name]) for name in names)
    steps = one.rows().keys() | other.rows().keys()
    losses = sum(one.rows().get(step, {}).get("loss") != other.rows().get(step, {}).get("loss") for step in steps)
    return [
        at_least("resumed from the point at step", other.resumed_from, 1),
        at_most("steps whose samples differ", _differing_samples(one, other), 0),
        at_most("steps whose loss differs in any bit", losses, 0),
        at_most("weight tensors that differ in any bit", differing, 0),
    ]


def same_within_rounding(one: Ended, other: Ended) -> list[Check]:
    """Checks that a training with another number of processes differs by rounding only."""
    begun, first, second = one.weights("checkpoints/1"), one.weights(), other.weights()
    apart = _norm([second[name] - first[name] for name in first])
    moved = _norm([first[name] - begun[name] for name in first])
    distance = "weights at another number of processes: distance as a share of what training moved them"
    return [
        at_most("steps whose samples differ at another number of processes", _differing_samples(one, other), 0),
        at_most(distance, apart / moved, CHANGE_LIMIT[one.precision]),
    ]


def _differing_samples(one: Ended, other: Ended) -> int:
    steps = one.rows().keys() | other.rows().keys()
    return sum(one.rows().get(step, {}).get("samples") != other.rows().get(step, {}).get("samples") for step in steps)


def _norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())
