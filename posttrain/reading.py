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
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Record:
    """One row of a data file and where it stands."""

    file: Path
    number: int
    """From 0."""
    values: dict[str, Any]

    def wrong(self, problem: str, hint: str = "") -> UserError:
        """The error that says what is wrong with this row."""
        return UserError(problem, file=self.file, key=f"row {self.number}", hint=hint)

    def messages(self, column: str, special_tokens: re.Pattern[str]) -> Messages:
        """A column's messages, once each has a known role and a text that spells out no special token.

        Raises:
            UserError: it holds anything else.
        """
        messages = self.values[column]
        if not isinstance(messages, list) or not messages:
            raise self.wrong(f"{column} is {'empty' if messages == [] else 'no list of messages'}")
        for place, message in enumerate(messages):
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
    if file.suffix == ".parquet":
        try:
            values = pq.read_table(file).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"can't be read as Parquet: {error}", file=file) from error
    elif file.suffix in (".jsonl", ".json"):
        values = files.read_rows(file)
    else:
        raise UserError("is neither .parquet nor .jsonl", file=file)
    if not values:
        raise UserError("holds no rows", file=file)
    rows = [Record(file, number, value) for number, value in enumerate(values)]
    for row in rows:
        for column in columns:
            if column not in row.values:
                raise row.wrong(f"has no column {column!r}", nearest(column, row.values))
    return rows
