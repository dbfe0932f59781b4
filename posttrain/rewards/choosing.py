"""Which answers to a prompt make preference pairs: one function each, which the key `choose` names.

Each is given the rewards of a prompt's answers and gives pairs of places, the chosen one and the rejected one, the
clearest pair first; no answer stands in two pairs on the same side.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Pairs = Iterator[tuple[int, int]]


@dataclass(frozen=True)
class Bounds:
    """What the choices are told."""

    quantile: float
    """The share of the lowest rewards that `best_worst_quantile` draws from."""
    chosen_above: float
    """The least reward of a chosen answer, for `threshold`."""
    rejected_below: float
    """The largest reward of a rejected answer, for `threshold`."""


def best_worst(rewards: Sequence[float], bounds: Bounds, drawn: random.Random) -> Pairs:  # noqa: ARG001 - as its siblings
    """The best answer against the worst, the second best against the second worst, and so on."""
    order = sorted(range(len(rewards)), key=lambda at: rewards[at])
    for place in range(len(order) // 2):
        yield order[-1 - place], order[place]


def best_worst_quantile(rewards: Sequence[float], bounds: Bounds, drawn: random.Random) -> Pairs:
    """The best answer against one drawn from the lowest share `quantile`, the second best against another, and so on.

    As in the Apertus report, where the share is 0.2: the worst of all is often broken, and teaches little.
    """
    order = sorted(range(len(rewards)), key=lambda at: rewards[at])
    lowest = order[: max(1, math.floor(len(order) * bounds.quantile))]
    drawn.shuffle(lowest)
    best = [at for at in reversed(order) if at not in lowest]
    yield from zip(best, lowest, strict=False)


def threshold(rewards: Sequence[float], bounds: Bounds, drawn: random.Random) -> Pairs:
    """Answers with at least `chosen_above` against those with at most `rejected_below`, each drawn."""
    chosen = [at for at, value in enumerate(rewards) if value >= bounds.chosen_above]
    rejected = [at for at, value in enumerate(rewards) if value <= bounds.rejected_below]
    yield from _drawn(chosen, rejected, drawn)


def right_wrong(rewards: Sequence[float], bounds: Bounds, drawn: random.Random) -> Pairs:  # noqa: ARG001 - as its siblings
    """Right answers, whose reward is above 0, against wrong ones, each drawn; for rewards that can be verified."""
    right = [at for at, value in enumerate(rewards) if value > 0]
    wrong = [at for at, value in enumerate(rewards) if value <= 0]
    yield from _drawn(right, wrong, drawn)


def _drawn(chosen: list[int], rejected: list[int], drawn: random.Random) -> Pairs:
    drawn.shuffle(chosen)
    drawn.shuffle(rejected)
    yield from zip(chosen, rejected, strict=False)
