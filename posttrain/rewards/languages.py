"""Tells the language of a text by its letters: naive Bayes over groups of three characters, from texts that are given.

Each language has the frequencies of its groups, one added to each count; a text has the language under which its own
groups are most likely (Cavnar and Trenkle 1994 compare ranks of the same groups).
"""

import functools
import itertools
from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cordee.data.row import Row
from cordee.data.rows import batches
from cordee.errors import UserError, nearest

GROUPS = 1 << 15
"""Numbers that groups of characters are mapped to; few of those in use share one."""
_MIX = np.array([2654435761, 40503, 1], dtype=np.uint64)


class Languages:
    """The languages of some texts."""

    def __init__(self, file: Path, counts: dict[str, npt.NDArray[np.float64]]) -> None:
        """Languages by tag, each with the `[GROUPS]` counts of its groups."""
        self.file, self.tags = file, sorted(counts)
        smoothed = np.stack([counts[tag] for tag in self.tags]) + 1.0
        self._logprobs = np.log(smoothed / smoothed.sum(axis=1, keepdims=True))
        """`[languages, GROUPS]`, in nats."""

    def of(self, text: str) -> str | None:
        """The tag of the most likely language; None of a text without letters."""
        groups = _groups(text)
        return self.tags[int(self._logprobs[:, groups].sum(axis=1).argmax())] if len(groups) else None

    def require(self, tags: Collection[str]) -> None:
        """Check that these languages can be told.

        Raises:
            UserError: there are no texts in one.
        """
        for tag in sorted(tags):
            if tag not in self.tags:
                raise UserError(f"has no text in {tag!r}", file=self.file, key="texts", hint=nearest(tag, self.tags))


@functools.cache
def known(file: Path) -> Languages:
    """The languages of a data file with the columns `text` and `language`.

    Raises:
        UserError: it has no such rows.
    """
    counts: dict[str, npt.NDArray[np.float64]] = {}
    for row in itertools.chain.from_iterable(batches([file], key="texts")):
        text, tag = _columns(row)
        own = counts.setdefault(tag, np.zeros(GROUPS))
        own += np.bincount(_groups(text).astype(np.int64), minlength=GROUPS)
    if len(counts) < 2:
        raise UserError(f"holds texts in {len(counts)} languages, and two are needed", file=file, key="texts")
    return Languages(file, counts)


def _columns(row: Row) -> tuple[str, str]:
    values = row.values if isinstance(row.values, dict) else {}
    text, tag = values.get("text"), values.get("language")
    if not isinstance(text, str) or tag is None:
        raise UserError(f"{row.place} has no `text` with its `language`", file=row.file, key="texts")
    return text, str(tag)


def _groups(text: str) -> npt.NDArray[np.uint64]:
    """`[groups]`: the numbers of a text's groups of three letters, what is between words being one blank."""
    letters = "".join(sign if sign.isalpha() or not sign.isascii() else " " for sign in text.casefold())
    words = " ".join(letters.split())
    if not any(map(str.isalpha, words)):
        return np.zeros(0, dtype=np.uint64)
    points = np.frombuffer(f" {words} ".encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    hashed = points[:-2] * _MIX[0] + points[1:-1] * _MIX[1] + points[2:] * _MIX[2]
    found: npt.NDArray[np.uint64] = (hashed ^ (hashed >> np.uint64(15))) % np.uint64(GROUPS)
    return found
