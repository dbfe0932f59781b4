"""Rows of chats and of pairs, read from Parquet and JSON lines; what is wrong with one is said by file and row."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cordee import files
from cordee.errors import UserError, nearest

ROLES = ("system", "user", "assistant")
HEAD_BYTES = 1_000_000
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Record:
    """One row of a data file and where it stands."""

    file: Path
    number: int
    """From 1, as an editor counts lines."""
    values: dict[str, Any]

    def wrong(self, problem: str, hint: str = "") -> UserError:
        """The error that says what is wrong with this row."""
        return UserError(problem, file=self.file, key=f"row {self.number}", hint=hint)

    def require(self, columns: Sequence[str]) -> None:
        """See that a row has these columns.

        Raises:
            UserError: it lacks one.
        """
        for column in columns:
            if column not in self.values:
                raise self.wrong(f"has no column {column!r}", nearest(column, self.values))

    def messages(self, column: str, special_tokens: re.Pattern[str]) -> Messages:
        """A column's messages, once each has a known role and a text that spells out no special token.

        Raises:
            UserError: it holds anything else.
        """
        messages = self.values[column]
        if not isinstance(messages, list) or not messages:
            raise self.wrong(f"{column} is {'empty' if messages == [] else 'no list of messages'}")
        for place, message in enumerate(messages, 1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise self.wrong(f"{column}: message {place} has no role")
            if message["role"] not in ROLES:
                problem = f"{column}: unknown role {message['role']!r} in message {place}"
                raise self.wrong(problem, nearest(message["role"], ROLES))
            if not isinstance(message.get("content"), str) or not message["content"].strip():
                raise self.wrong(f"{column}: message {place} has no content")
            if found := special_tokens.search(message["content"]):
                raise self.wrong(f"{column}: message {place} spells out the special token {found.group()!r}")
        return messages


def read(file: Path, columns: Sequence[str]) -> list[Record]:
    """The rows of a Parquet or JSON-lines file, with the columns asked for in every row.

    Raises:
        UserError: the file is neither, can't be read, is empty, or lacks a column.
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
    rows = [Record(file, number, value) for number, value in enumerate(values, 1)]
    for row in rows:
        row.require(columns)
    return rows


def estimate(file: Path, columns: Sequence[str]) -> tuple[float, float]:
    """About how many rows a file holds, and bytes of text in the columns asked for, from its beginning alone.

    Raises:
        UserError: as `read` does, where its beginning shows it.
    """
    if _is_parquet(file):
        try:
            metadata = pq.read_metadata(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"can't be read as Parquet: {error}", file=file) from error
        Record(file, 1, dict.fromkeys(metadata.schema.to_arrow_schema().names)).require(columns)
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
    Record(file, 1, first[0]).require(columns)
    size = file.stat().st_size
    return size / max(sum(map(len, lines)), 1) * len(lines), float(size)


def _is_parquet(file: Path) -> bool:
    """Whether a file is Parquet by its name, or else JSON lines.

    Raises:
        UserError: it is neither.
    """
    if file.suffix not in (".parquet", ".jsonl", ".json"):
        raise UserError("is neither .parquet nor .jsonl", file=file)
    return file.suffix == ".parquet"
