"""What scored answers are like: each reward's mean, spread and distribution, over all and by language and kind."""

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from posttrain.rewards.opening import VALUE

BINS = 20
BY = ("language", "kind")
"""The columns by whose values rewards are told apart, where they are there."""
MOST_VALUES = 100
"""Values of such a column that are told apart."""


class Summary:
    """Rewards as they come; memory holds a number for each."""

    def __init__(self) -> None:
        self._values: dict[str, array[float]] = defaultdict(lambda: array("d"))
        self._nulls: Counter[str] = Counter()
        self._by: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in BY}
        """By column, by its value, by reward: how many, and their sum."""
        self._further: dict[str, dict[str, list[float]]] = {}
        """By reward, by what else is told of an answer: how many, and their sum."""

    def add(self, name: str, value: float | None, row: Mapping[str, Any]) -> None:
        """Count a reward of a row."""
        if value is None:
            self._nulls[name] += 1
            return
        self._values[name].append(value)
        for column, known in self._by.items():
            if (own := row.get(column)) is not None and (str(own) in known or len(known) < MOST_VALUES):
                _count(known.setdefault(str(own), {}), name, value)

    def add_further(self, name: str, figures: Mapping[str, Any]) -> None:
        """Count what else a reward tells of an answer."""
        for key, value in figures.items():
            if key != VALUE and value is not None:
                _count(self._further.setdefault(name, {}), key, value)

    def further(self, name: str, key: str) -> float | None:
        """The mean of what else a reward tells."""
        count, total = self._further.get(name, {}).get(key, (0, 0.0))
        return total / count if count else None

    def described(self) -> dict[str, Any]:
        """By reward: `mean`, `std`, `least`, `most`, the share of rows that have none, and a histogram."""
        found: dict[str, Any] = {}
        for name in sorted({*self._values, *self._nulls}):
            values, nulls = self._values[name], self._nulls[name]
            further = {key: self.further(name, key) for key in self._further.get(name, {})}
            found[name] = {"answers": len(values), "null_share": nulls / (len(values) + nulls), **further}
            if values:
                mean = math.fsum(values) / len(values)
                std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
                found[name] |= {"mean": mean, "std": std, "least": min(values), "most": max(values)}
                found[name] |= {"histogram": histogram(values)}
        return found

    def by(self) -> dict[str, Any]:
        """By column, by its value, by reward: the mean and of how many."""
        return {
            column: {
                value: {name: {"mean": total / count, "answers": count} for name, (count, total) in own.items()}
                for value, own in sorted(known.items())
            }
            for column, known in self._by.items()
            if known
        }


def histogram(values: "array[float]") -> list[int]:
    """How many values are in each of `BINS` equal parts from the least to the largest."""
    low, high = min(values), max(values)
    counts = [0] * BINS
    for value in values:
        counts[min(int((value - low) / (high - low) * BINS), BINS - 1) if high > low else 0] += 1
    return counts


def _count(known: dict[str, list[float]], name: str, value: float) -> None:
    entry = known.setdefault(name, [0, 0.0])
    entry[0] += 1
    entry[1] += value
