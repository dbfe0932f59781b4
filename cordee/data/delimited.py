"""Rows out of CSV and TSV files, one at a time.

The first line names the columns; one without a name is called `column 2` by its place. Every value is text, as it
stands there; an empty field is "". Fields may be quoted as in RFC 4180, and hold line ends then. The delimiter of a
`.csv` file is the comma, or where its header has none, as in countries that write decimals with it, `;` or a tab.
"""

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from cordee.data.kinds import kind
from cordee.data.row import NO_UTF8, Broken, Row, UnreadableError, shown


def delimited_rows(file: Path, opened: io.BufferedReader) -> Iterator[Row]:
    """The rows of a CSV or TSV file, numbered by the line where each begins; blank lines are none.

    Raises:
        UnreadableError: the quotes are not balanced, or two columns have one name.
    """
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the 131,072 characters that are allowed else
    lines = io.TextIOWrapper(opened, "utf-8-sig", "surrogateescape", newline="")
    header = lines.readline()
    delimiter = _delimiter(header) if kind(file)[0] == ".csv" else "\t"
    names: list[str] = []
    for number, fields in _records(csv.reader(chain([header], lines), delimiter=delimiter, strict=True)):
        if names:
            yield Row(file, number, _values(names, fields, delimiter), "line")
        else:
            names = _names(fields)


def _delimiter(header: str) -> str:
    """The first of the known delimiters that a header has outside quotes, or else the comma."""
    return next((one for one in ",;\t" if len(next(csv.reader([header], delimiter=one), [])) > 1), ",")


def _records(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The records of a reader of the module `csv`, each with its first line."""
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UnreadableError(f"no CSV in line {number}: {error}") from error
        if fields is None:
            return
        if fields:
            yield number, fields


def _names(fields: Sequence[str]) -> list[str]:
    """The columns' names."""
    names = [field or f"column {place}" for place, field in enumerate(fields, 1)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UnreadableError(f"has two columns {twice!r}")
    if not _is_utf8("".join(names)):
        raise UnreadableError("the names of the columns are no UTF-8")
    return names


def _values(names: Sequence[str], fields: Sequence[str], delimiter: str) -> dict[str, Any] | Broken:
    if not _is_utf8("".join(fields)):
        return Broken(NO_UTF8, shown(delimiter.join(fields)))
    if len(fields) != len(names):
        return Broken(f"not the {len(names)} fields of the header", shown(delimiter.join(fields)))
    return dict(zip(names, fields, strict=True))


def _is_utf8(text: str) -> bool:
    """Whether a text that was decoded with `surrogateescape` was UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
