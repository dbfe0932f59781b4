"""Rows of chats and of pairs, read from Parquet and JSON lines, and one error for all that is wrong with them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cordee import files
from cordee.errors import UserError, nearest

HEAD_BYTES = 1_000_000
SHOWN = 3
"""Rows that an error names of each kind of problem."""
Note = Callable[[str], None]
"""Told what is not as one might expect, and is no error."""


@dataclass(frozen=True)
class Record:
    """One row of a data file and where it stands."""

    file: Path
    number: int
    """From 1, as an editor counts lines."""
    values: dict[str, Any]


class BadRowError(Exception):
    """A row that can't be used: the kind of problem, what shows it in this row (`message 2`), and what to write."""

    def __init__(self, problem: str, shown_by: str = "", hint: str = "") -> None:
        super().__init__(problem)
        self.problem, self.shown_by, self.hint = problem, shown_by, hint


class Problems:
    """What is wrong with a file's rows, gathered, so that one error names every kind with its first rows."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._rows: dict[tuple[str, str], dict[int, str]] = {}

    @contextmanager
    def of(self, number: int) -> Iterator[None]:
        """Note a `BadRowError` of the row with this number and go on."""
        try:
            yield
        except BadRowError as error:
            self._rows.setdefault((error.problem, error.hint), {}).setdefault(number, error.shown_by)

    def raise_any(self, total: int) -> None:
        """End with all that was noted about the file's `total` rows.

        Raises:
            UserError: there was something.
        """
        if not self._rows:
            return
        kinds = [(problem, hint, _names(rows)) for (problem, hint), rows in self._rows.items()]
        count = len({number for rows in self._rows.values() for number in rows})
        if len(kinds) > 1:
            told = "; ".join(f"{problem} ({names}{f'; {hint}' if hint else ''})" for problem, hint, names in kinds)
            raise UserError(told, file=self.file, key=f"{count} of {total} rows")
        problem, hint, names = kinds[0]
        if count == 1:
            (number, shown_by), *_ = next(iter(self._rows.values())).items()
            names, problem = f"row {number}", f"{problem} ({shown_by})" if shown_by else problem
        else:
            names = f"{count} of {total} rows ({names})"
        raise UserError(problem, file=self.file, key=names, hint=hint)


def _names(rows: dict[int, str]) -> str:
    """`row 4: message 2`, or `rows 4: message 2, 9: message 1, 12: message 2 and 21 more`."""
    shown = [f"{number}: {shown_by}" if shown_by else str(number) for number, shown_by in rows.items()]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f"row{'s' if len(shown) > 1 else ''} {', '.join(shown[:SHOWN])}{more}"


@dataclass(frozen=True)
class Limits:
    """What the longest sequence and the largest token id may be."""

    max_length: int | None
    """Tokens that `max_length` allows; None where it sets no limit."""
    positions: int | None
    """Positions of the model; None where it has no limit."""
    vocab_size: int
    """Rows of the model's input embedding."""

    def check(self, ids: Sequence[int]) -> None:
        """See that a sequence fits.

        Raises:
            BadRowError: it does not.
        """
        if self.max_length is not None and len(ids) > self.max_length:
            problem = f"longer than max_length={self.max_length} tokens: nothing is cut off in silence"
            raise BadRowError(problem, f"{len(ids)} tokens", "raise it, or leave these rows out")
        if self.positions is not None and len(ids) > self.positions:
            raise BadRowError(f"longer than the model's {self.positions} positions", f"{len(ids)} tokens")
        if (largest := max(ids, default=0)) >= self.vocab_size:
            problem = f"a token id beyond the {self.vocab_size} rows of the model's embedding: is it its tokenizer?"
            raise BadRowError(problem, f"id {largest}")


@dataclass
class Notes:
    """What is not as one might expect in a file, and is no error."""

    apart: int = 0
    otherwise: int = 0
    without_end: int = 0
    other_columns: list[str] = field(default_factory=list)

    def tell(self, file: Path, note: Note) -> None:
        """Say each once, with its count."""
        said = {
            "answers that the chat template renders otherwise once more follows: each has its own sequence": self.apart,
            "prompts that end otherwise alone than before their answer: loss begins where the two part": self.otherwise,
            "answers after which the chat template writes no special token: nothing teaches to stop": self.without_end,
        }
        for what, count in said.items():
            if count:
                note(f"{file.name}: {count} {what}")
        if self.other_columns:
            note(f"{file.name}: columns that are kept out: {', '.join(self.other_columns)}")


def read(file: Path) -> list[Record]:
    """The rows of a Parquet or JSON-lines file.

    Raises:
        UserError: the file is neither, can't be read, or is empty.
    """
    if _is_parquet(file):
        try:
            values = pq.read_table(file).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"can't be read as Parquet: {error}", file=file) from error
    else:
        values = files.read_rows(file)
    if not values:
        raise UserError("holds no rows", file=file)
    return [Record(file, number, value) for number, value in enumerate(values, 1)]


def estimate(file: Path, columns: Sequence[str]) -> tuple[float, float]:
    """About how many rows a file holds, and bytes of text in the columns asked for, from its beginning alone.

    Raises:
        UserError: as `read` does, or a column is missing, where its beginning shows it.
    """
    if _is_parquet(file):
        try:
            metadata = pq.read_metadata(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"can't be read as Parquet: {error}", file=file) from error
        _require(Record(file, 1, dict.fromkeys(metadata.schema.to_arrow_schema().names)), columns)
        if not metadata.num_rows:
            raise UserError("holds no rows", file=file)
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
        wanted = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
        return float(metadata.num_rows), float(sum(chunk.total_uncompressed_size for chunk in wanted))
    with file.open("rb") as opened:
        lines = opened.readlines(HEAD_BYTES)
    first = files.rows_of(lines, file)[:1]
    if not first:
        raise UserError("holds no rows", file=file)
    _require(Record(file, 1, first[0]), columns)
    size = file.stat().st_size
    return size / max(sum(map(len, lines)), 1) * len(lines), float(size)


def _require(record: Record, columns: Sequence[str]) -> None:
    """See that a row has these columns."""
    problems = Problems(record.file)
    for column in columns:
        with problems.of(record.number):
            require(record.values, column)
    problems.raise_any(1)


def require(values: dict[str, Any], column: str) -> None:
    """See that a row has a column.

    Raises:
        BadRowError: it lacks it.
    """
    if column not in values:
        raise BadRowError(f"has no column {column!r}", hint=nearest(column, values))


def _is_parquet(file: Path) -> bool:
    """Whether a file is Parquet by its name, or else JSON lines.

    Raises:
        UserError: it is neither.
    """
    if file.suffix not in (".parquet", ".jsonl", ".json"):
        raise UserError("is neither .parquet nor .jsonl", file=file)
    return file.suffix == ".parquet"
