"""What a row of a data file is, or why it is none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SHOWN_CHARACTERS = 80
NO_UTF8, NO_JSON, HALF = "no UTF-8", "no JSON object", "half a character (a lone surrogate)"
COMMA = "a comma behind the object, which JSON lines do not have"


class UnreadableError(Exception):
    """A file that can't be read on from here, because what follows has no meaning."""


@dataclass(frozen=True)
class Broken:
    """A row that can't be read."""

    problem: str
    """The kind of problem: `no UTF-8`."""
    row: str
    """Its first characters."""


@dataclass(frozen=True)
class Row:
    """One row of a data file and where it stands."""

    file: Path
    number: int
    """From 1: the line where it begins, as an editor counts them, or in tables and JSON arrays the row."""
    values: dict[str, Any] | Broken
    """Column → value."""
    unit: Literal["row", "line"] = "row"
    """What `number` counts."""

    @property
    def place(self) -> str:
        """Where it stands in its file: `line 3`."""
        return f"{self.unit} {self.number}"


def beginning(row: str) -> str:
    """The first characters of a row, for messages."""
    return row if len(row) <= SHOWN_CHARACTERS else f"{row[: SHOWN_CHARACTERS - 1]}…"


def shown(text: str) -> str:
    """The first characters of a text that was decoded with `surrogateescape`; bytes that are no UTF-8 are replaced."""
    return beginning(text).encode(errors="surrogateescape").decode(errors="replace")
