"""Any data files as one stream of rows, and what their beginnings tell of them. See `row` for what a row is."""

import io
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from cordee.data import lines, tables
from cordee.data.delimited import delimited_rows
from cordee.data.kinds import DELIMITED, TABLES, kind
from cordee.data.row import NO_UTF8, Broken, Row, UnreadableError, beginning
from cordee.errors import UserError

ROWS_AT_ONCE = 1000
HEAD_BYTES = 1_000_000
COMPRESSION = 3.0
"""How many times larger compressed text is taken to be."""
TROUBLE = (EOFError, OSError, zlib.error, pa.ArrowException, UnreadableError)
"""What a file raises that can't be read to its end."""

OUT_OF_RANGE = (pa.ArrowException, ValueError, OverflowError)
"""What values raise that Python can't hold: dates beyond the year 9999, text that is no UTF-8."""


def batches(files: Sequence[Path], size: int = ROWS_AT_ONCE, key: str | None = None) -> Iterator[list[Row]]:
    """The rows of all files, in their order, `size` at a time; memory holds no more, however large the files are.

    Values of tables are Python values: dates, decimals and bytes as they come. A row that can't be read is `Broken`.

    Args:
        files: of any kind.
        size: rows of a batch; the last one of all is shorter.
        key: the key that names the files, for errors.

    Raises:
        UserError: a file can't be read to its end; says how many rows were read before.
    """
    rows = (row for file in files for row in _rows(file, key))
    while batch := list(islice(rows, size)):
        yield batch


def estimate(
    files: Sequence[Path], key: str | None = None, columns: Collection[str] | None = None
) -> tuple[float, float]:
    """About how many rows files hold, and bytes of text, from metadata and beginnings alone.

    Of Parquet, only these `columns` count, where it has any of them.

    Raises:
        UserError: a file can't be read, as far as its beginning shows.
    """
    found = [_size(file, key, columns) for file in files]
    return sum(rows for rows, _ in found), sum(text_bytes for _, text_bytes in found)


def _rows(file: Path, key: str | None) -> Iterator[Row]:
    """A file's rows."""
    if kind(file)[0] in TABLES:
        yield from _of_table(file, key)
        return
    done = 0
    try:
        with lines.open_file(file) as opened:
            for row in _reader(file)(file, opened):
                yield row
                done += 1
    except TROUBLE as error:
        rows = f"{done} row{'s were' if done != 1 else ' was'} read before"
        raise UserError(f"can't be read to its end: {error}", file=file, key=key, hint=rows) from error


def _reader(file: Path) -> Callable[[Path, io.BufferedReader], Iterator[Row]]:
    """What reads a file that is no table."""
    suffix, _ = kind(file)
    return delimited_rows if suffix in DELIMITED else lines.paragraphs if suffix == ".txt" else lines.json_rows


def _of_table(file: Path, key: str | None) -> Iterator[Row]:
    done = 0
    for batch in tables.record_batches(file, ROWS_AT_ONCE, key):
        for number, values in enumerate(_values(batch), done + 1):
            yield Row(file, number, values)
        done += batch.num_rows


def _values(batch: pa.RecordBatch) -> list[dict[str, Any] | Broken]:
    """The rows of a batch as Python values."""
    invalid = tables.invalid_rows(batch)
    if not invalid:
        with suppress(*OUT_OF_RANGE):
            return list(batch.to_pylist())
    return [_value(batch.slice(row, 1), row in invalid) for row in range(batch.num_rows)]


def _value(row: pa.RecordBatch, is_invalid: bool) -> dict[str, Any] | Broken:
    values = {name: _shown(row.column(name)) for name in row.schema.names}
    if not is_invalid:
        with suppress(*OUT_OF_RANGE):
            return dict(row.to_pylist()[0])
    return Broken(NO_UTF8 if is_invalid else "a value that Python can't hold", beginning(str(values)))


def _shown(column: pa.Array) -> Any:
    """The value of a column of one row, for messages."""
    try:
        return column.to_pylist()[0]
    except OUT_OF_RANGE:
        return "\ufffd"


def _size(file: Path, key: str | None, columns: Collection[str] | None) -> tuple[float, float]:
    """About how many rows a file holds, and bytes of text."""
    suffix, codec = kind(file)
    if suffix == ".parquet":
        metadata = tables.open_parquet(file, key).metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
        wanted = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in (columns or ())] or chunks
        return metadata.num_rows, sum(chunk.total_uncompressed_size for chunk in wanted)
    if suffix == ".arrow":
        return tables.num_rows(file, key), file.stat().st_size
    try:
        with lines.open_file(file) as opened:
            head = opened.read(HEAD_BYTES)
    except TROUBLE as error:
        raise UserError(f"can't be read: {error}", file=file, key=key) from error
    if len(head) < HEAD_BYTES:
        return sum(1 for _ in _rows(file, key)), len(head)
    rows = 0
    with suppress(UnreadableError):  # the head ends within an array
        for _ in _reader(file)(file, io.BufferedReader(io.BytesIO(head), lines.HEAD_BYTES)):
            rows += 1
    total = file.stat().st_size * (COMPRESSION if codec else 1)
    # where one object holds all rows, the head does not show their number
    return rows * total / HEAD_BYTES if rows > 1 else sum(1 for _ in _rows(file, key)), total
