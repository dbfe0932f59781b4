"""Batches of rows out of Parquet and Arrow files."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cordee.data.kinds import kind
from cordee.errors import UserError

BUFFER_BYTES = 2**20
"""Of a column of a Parquet file so much is read at a time, where else a whole row group would be."""


def open_parquet(file: Path, key: str | None = None) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        UserError: it can't be read: cut off, or no Parquet.
    """
    try:
        return pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"can't be read as Parquet: {error}", file=file, key=key) from error


def column_names(file: Path, key: str | None = None) -> list[str]:
    """The names of a file's columns, of which two may be the same.

    Raises:
        UserError: it can't be read.
    """
    if kind(file)[0] == ".parquet":
        return list(open_parquet(file, key).schema_arrow.names)
    with _as_user_error(file, key), pa.memory_map(str(file)) as opened:
        return list(_open_arrow(opened).schema.names)


def num_rows(file: Path, key: str | None = None) -> int:
    """The rows of a file, of which no value is read.

    Raises:
        UserError: it can't be read.
    """
    if kind(file)[0] == ".parquet":
        return int(open_parquet(file, key).metadata.num_rows)
    with _as_user_error(file, key), pa.memory_map(str(file)) as opened:
        return sum(batch.num_rows for batch in _arrow_batches(_open_arrow(opened)))


def require_once(names: Sequence[str], file: Path, key: str | None = None) -> None:
    """See that no two columns have one name.

    Raises:
        UserError: two have.
    """
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"has two columns {twice!r}", file=file, key=key)


def record_batches(
    file: Path, size: int, key: str | None = None, columns: Collection[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """A file's rows, at most `size` at a time, of which memory holds few.

    Args:
        file: a `.parquet` or `.arrow` file.
        size: most rows of a batch.
        key: the key that names the file, for errors.
        columns: those to read, of which the file may lack some; None for all.

    Raises:
        UserError: it can't be read to its end, or has one of these columns twice.
    """
    used = [name for name in column_names(file, key) if columns is None or name in columns]
    require_once(used, file, key)
    is_parquet = kind(file)[0] == ".parquet"
    done = 0
    try:
        for batch in _of_parquet(file, size, used, key) if is_parquet else _of_arrow(file, size, used):
            yield batch
            done += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        format_name = "Parquet" if is_parquet else "Arrow"
        raise UserError(f"can't be read as {format_name} after row {done}: {error}", file=file, key=key) from error


def invalid_rows(batch: pa.RecordBatch) -> set[int]:
    """The rows in which the text of any column is not UTF-8; pyarrow does not check this when it reads."""
    found: set[int] = set()
    for column in batch.columns:
        if not _is_valid(column):
            # copied, since of a slice of structs or lists the values of all rows would be checked
            found |= {row for row in range(len(column)) if not _is_valid(column.take(pa.array([row])))}
    return found


def _is_valid(column: pa.Array) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _of_parquet(file: Path, size: int, columns: list[str], key: str | None) -> Iterator[pa.RecordBatch]:
    parquet = open_parquet(file, key)
    yield from parquet.iter_batches(size, columns=columns if len(columns) < len(parquet.schema_arrow.names) else None)


def _of_arrow(file: Path, size: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(file)) as opened:  # what is mapped into memory counts as used
        for batch in _arrow_batches(_open_arrow(opened)):
            rows = batch.select(columns)
            yield from (rows.slice(start, size) for start in range(0, rows.num_rows, size))


def _open_arrow(opened: pa.NativeFile) -> Any:
    """A reader of an Arrow file, as `datasets` saves them (a stream) or in the file format."""
    try:
        return pa.ipc.open_stream(opened)
    except pa.ArrowInvalid:
        opened.seek(0)
        return pa.ipc.open_file(opened)


def _arrow_batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if hasattr(reader, "__iter__"):
        return iter(reader)
    return map(reader.get_batch, range(reader.num_record_batches))


@contextmanager
def _as_user_error(file: Path, key: str | None) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"can't be read as Arrow: {error}", file=file, key=key) from error
