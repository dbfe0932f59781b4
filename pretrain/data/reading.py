"""Documents out of data files, some hundred at a time; rows that can't be documents are named by file and row.

A row of a file, as `cordee.data.rows` reads it, is a document if it has a `text`. Of tables, the other columns stay in
Arrow, with their types.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cordee.data import rows, tables
from cordee.data.kinds import TABLES, kind
from cordee.data.row import NO_UTF8, Broken, Row, beginning
from cordee.errors import UserError, nearest

BYTES_PER_TOKEN = 3.0
"""Bytes of UTF-8 in a token, where only a guess is possible (before there is a tokenizer)."""

ROWS_AT_ONCE = 256

Column: TypeAlias = "list[Any] | pa.Array"
"""`[rows]`: Python values from JSON, or an Arrow array."""
T = TypeVar("T")


@dataclass(frozen=True)
class Bad:
    """A row that can't be a document."""

    problem: str
    """What is wrong: `empty text`."""
    file: Path
    place: str
    """Its row or line in the file, counted from 1: `line 3`."""
    row: str
    """Its first characters."""
    hint: str = ""


@dataclass(frozen=True)
class Chunk:
    """Some consecutive documents of a file."""

    texts: list[str]
    columns: dict[str, Column]
    """The other columns by name, each `[documents]`."""
    bad: list[Bad]
    """The rows among them that can't be documents."""

    def values(self, name: str) -> list[Any]:
        """A column as Python values; of one that the file lacks, None for each document."""
        return values_of(self.columns[name]) if name in self.columns else [None] * len(self.texts)

    def take(self, rows: Sequence[int]) -> "Chunk":
        """These of its documents, in this order; the rows that can't be documents stay with it."""
        columns = {
            name: [column[row] for row in rows] if isinstance(column, list) else column.take(pa.array(rows, pa.int64()))
            for name, column in self.columns.items()
        }
        return Chunk([self.texts[row] for row in rows], columns, self.bad)


def values_of(column: Column) -> list[Any]:
    """A column as Python values."""
    return column if isinstance(column, list) else list(column.to_pylist())


def words(values: Iterable[Any]) -> list[str]:
    """Values as words to count by: text as it is, "" for null, JSON for anything else."""
    return [
        "" if value is None else value if isinstance(value, str) else json.dumps(value, default=str) for value in values
    ]


def batches(items: Iterable[T], size: int = ROWS_AT_ONCE) -> Iterator[list[T]]:
    """The items in lists of `size`, the last one shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def split_file(corpus: Path, split: str) -> Path:
    """The file of a corpus artifact's split, `train` or `heldout`.

    Raises:
        UserError: there is none.
    """
    file = corpus / f"{split}.parquet"
    if not file.is_file():
        raise UserError(f"holds no {file.name}", file=corpus, key="corpus", hint="give a corpus of pretrain.corpus")
    return file


def num_rows(file: Path) -> int:
    """Rows of a corpus's split.

    Raises:
        UserError: the file can't be read, or has no column `text`.
    """
    return int(open_parquet(file, "corpus").metadata.num_rows)


def texts(file: Path) -> Iterator[str]:
    """The text of each document of a corpus's split; no other column is read.

    Raises:
        UserError: the file can't be read, or holds a row that can't be a document.
    """
    for chunk in _sound_chunks(file, columns=()):
        yield from chunk.texts


def documents(file: Path) -> Iterator[dict[str, str]]:
    """`text` and `language` of each document of a corpus's split; the language is "" where there is none.

    Raises:
        UserError: the file can't be read, or holds a row that can't be a document.
    """
    for chunk in _sound_chunks(file, columns=("language",)):
        for text, language in zip(chunk.texts, words(chunk.values("language")), strict=True):
            yield {"text": text, "language": language}


def _sound_chunks(file: Path, columns: Collection[str]) -> Iterator[Chunk]:
    for chunk in chunks(file, "corpus", columns):
        for bad in chunk.bad:
            raise UserError(f"{bad.problem}: {bad.row}", file=f"{file}, {bad.place}", key="corpus", hint=bad.hint)
        yield chunk


def chunks(file: Path, key: str = "source", columns: Collection[str] | None = None) -> Iterator[Chunk]:
    """A file's documents in chunks of at most `ROWS_AT_ONCE` rows.

    Args:
        file: of any kind.
        key: the key that names it, for errors.
        columns: those to read besides `text`; None for all.

    Raises:
        UserError: the file can't be read, or has no column `text`.
    """
    if kind(file)[0] not in TABLES:
        for batch in rows.batches([file], ROWS_AT_ONCE, key):
            yield _of_rows(batch, columns)
        return
    _require_text(tables.column_names(file, key), file, key)
    used = None if columns is None else {"text", *columns}
    yield from _of_tables(file, tables.record_batches(file, ROWS_AT_ONCE, key, used))


def _of_rows(batch: Sequence[Row], columns: Collection[str] | None) -> Chunk:
    """A chunk of rows from any file that is no table."""
    good: list[dict[str, Any]] = []
    bad: list[Bad] = []
    for row in batch:
        values = row.values
        if isinstance(values, Broken):
            bad.append(Bad(values.problem, row.file, row.place, values.row))
        elif "text" not in values:
            bad.append(Bad("no 'text'", row.file, row.place, beginning(json.dumps(values)), nearest("text", values)))
        elif problem := _problem(values["text"]):
            bad.append(Bad(problem, row.file, row.place, beginning(json.dumps(values, ensure_ascii=False))))
        else:
            good.append(values)
    names = dict.fromkeys(
        name for values in good for name in values if name != "text" and (columns is None or name in columns)
    )
    return Chunk([row["text"] for row in good], {name: [row.get(name) for row in good] for name in names}, bad)


def _problem(text: Any) -> str:
    """Why a row with this text can't be a document; "" where it can."""
    if text is None:
        return "null text"
    if not isinstance(text, str):
        return f"text of type {type(text).__name__}"
    return "" if text and not text.isspace() else "empty text"


def open_parquet(file: Path, key: str) -> pq.ParquetFile:
    """Open a Parquet file with a column `text`.

    Raises:
        UserError: it can't be read (cut off, no Parquet), or has no such column.
    """
    parquet = tables.open_parquet(file, key)
    _require_text(parquet.schema_arrow.names, file, key)
    return parquet


def _require_text(names: list[str], file: Path, key: str) -> None:
    if "text" not in names:
        raise UserError("has no column 'text'", file=file, key=key, hint=nearest("text", names))


def _of_tables(file: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[Chunk]:
    """Chunks of Arrow's batches of rows, whose types are kept."""
    done = 0
    for batch in batches:
        texts, invalid = _texts(batch.column("text")), tables.invalid_rows(batch)
        problems = [NO_UTF8 if row in invalid else _problem(text) for row, text in enumerate(texts)]
        bad = [
            Bad(problem, file, f"row {done + row + 1}", beginning(str(texts[row])))
            for row, problem in enumerate(problems)
            if problem
        ]
        done += len(texts)
        good = batch.filter(pa.array([not problem for problem in problems])) if bad else batch
        columns = {name: good.column(name) for name in batch.schema.names if name != "text"}
        yield Chunk([text for text, problem in zip(texts, problems, strict=True) if not problem], columns, bad)


def _texts(column: pa.Array) -> list[Any]:
    """The values of the column `text`; bytes that are not UTF-8 become replacement characters."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [raw and raw.decode(errors="replace") for raw in column.cast(pa.large_binary()).to_pylist()]
