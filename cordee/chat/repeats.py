"""Rows that stand there twice, and answers that another row contradicts: told by the hashes of their token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cordee.chat import columns
from cordee.chat.source import Of

Hashes = npt.NDArray[np.uint64]
Numbers = Mapping[str, npt.NDArray[Any]]
FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd: what is multiplied by it keeps all its bits."""
VALUES: dict[Of, tuple[str, str]] = {
    "labelled": ("label", "as good and as bad"),
    "scored": ("reward", "with different rewards"),
}
"""The number that answers have, and what is said of those that have it twice, and not the same."""


def lines(of: Of, parts: Sequence[Numbers]) -> list[str]:
    """What is to be noted of sequences, each kind once, with its count.

    Args:
        of: what the sequences are of.
        parts: columns of numbers, `[sequences]` each, as `columns.numbers` gives them: of one source after the other,
            or of whole rows of one. A row's sequences stand one behind the other.
    """
    known = [part for part in parts if len(part["number"])]
    if not known:
        return []
    numbers = {name: np.concatenate([part[name] for part in known]) for name in known[0]}
    found = [_twice(of, numbers, np.concatenate([_begins(part) for part in known]))]
    found.append(_both_ways(numbers) if of == "pairs" else _valued(of, numbers))
    return [line for line in found if line]


def together(*hashes: npt.NDArray[Any]) -> Hashes:
    """Hashes of several things in their order, `[sequences]`, from the hash or the number of each."""
    found = np.zeros(len(hashes[0]), np.uint64)
    for one in hashes:
        found = (found ^ one.view(np.uint64)) * FACTOR
        found ^= found >> np.uint64(32)
    return found


def _begins(part: Numbers) -> npt.NDArray[np.bool_]:
    """`[sequences]`: whether a sequence is the first of its row."""
    found = np.ones(len(part["number"]), dtype=bool)
    found[1:] = (np.diff(part["number"]) != 0) | (np.diff(part["file"]) != 0)
    return found


def _twice(of: Of, numbers: Numbers, begins: npt.NDArray[np.bool_]) -> str:
    """How many rows repeat another one: all that is trained of them is the same, and said to be as good."""
    values = [numbers[VALUES[of][0]]] if of in VALUES else []
    sequences = together(*(numbers[name] for name in columns.hashes(of)), *values)
    _, counts = np.unique(np.add.reduceat(sequences, np.flatnonzero(begins)), return_counts=True)
    repeated = counts[counts > 1]
    if not len(repeated):
        return ""
    told = f"{len(repeated):,} row{'s stand' if len(repeated) > 1 else ' stands'} there"
    often = "twice" if repeated.max() == 2 else f"several times, {repeated.sum():,} in all"
    return f"{told} {often}: posttrain.data removes duplicates"


def _both_ways(numbers: Numbers) -> str:
    """How many pairs are contradicted by another one, which prefers the other answer."""
    prompt, chosen, rejected = (numbers[name] for name in columns.hashes("pairs"))
    count = len(np.intersect1d(together(prompt, chosen, rejected), together(prompt, rejected, chosen))) // 2
    if not count:
        return ""
    told = f"{count:,} pair{'s stand' if count > 1 else ' stands'} there both ways round"
    return f"{told}: the answer that one row chooses another row rejects"


def _valued(of: Of, numbers: Numbers) -> str:
    """How many answers are said to be as good as they are by one row, and otherwise by another."""
    if of not in VALUES:
        return ""
    column, told = VALUES[of]
    answers, values = together(*(numbers[name] for name in columns.hashes(of))), numbers[column]
    order = np.lexsort((values, answers))
    answers, values = answers[order], values[order]
    differ = (answers[1:] == answers[:-1]) & (values[1:] != values[:-1])
    count = len(np.unique(answers[1:][differ]))
    return f"{count:,} answer{'s stand' if count > 1 else ' stands'} there {told}" if count else ""
