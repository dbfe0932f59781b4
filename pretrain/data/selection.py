"""Which documents a corpus keeps, and which of them it holds out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from pretrain.data.reading import Chunk, words

Value = bool | int | float | str


@dataclass(frozen=True)
class Selection:
    """What is kept and what is held out."""

    languages: Sequence[str] | None
    """Tags of the languages to keep, "" for documents without one; None for all."""
    holdout: Mapping[str, Sequence[Value]]
    """Column → values; a document is held out if any of its columns has one of the values."""
    holdout_fraction: float
    """Share of documents to hold out where no column says it."""
    seed: int

    def kept(self, chunk: Chunk) -> Chunk:
        """The documents in the languages that are kept."""
        if self.languages is None:
            return chunk
        tags = words(chunk.values("language"))
        return chunk.take([row for row, tag in enumerate(tags) if tag in self.languages])

    def are_held_out(self, chunk: Chunk) -> list[bool]:
        """By the columns, or by a hash that depends on text and seed alone, so that the order does not matter."""
        if not self.holdout:
            return [self._is_drawn(text) for text in chunk.texts]
        found = [False] * len(chunk.texts)
        for column, wanted in self.holdout.items():
            for row, value in enumerate(compared(chunk, column)):
                found[row] = found[row] or any(is_value(value, one) for one in wanted)
        return found

    def _is_drawn(self, text: str) -> bool:
        digest = blake2b(text.encode(), digest_size=8, key=str(self.seed).encode()).digest()
        return int.from_bytes(digest) < self.holdout_fraction * 2**64


def compared(chunk: Chunk, column: str) -> list[Any]:
    """A column as `holdout` compares it: no language is ""."""
    values = chunk.values(column)
    return ["" if value is None else value for value in values] if column == "language" else values


def is_value(value: Any, wanted: Value) -> bool:
    """Whether a document's value equals the one in a recipe; dates and decimals are compared as text."""
    if value is None or isinstance(value, bool) != isinstance(wanted, bool):
        return False
    return bool(value == wanted) or (not isinstance(value, bool | int | float | str) and str(value) == wanted)
