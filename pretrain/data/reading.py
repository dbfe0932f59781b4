"""Documents out of data files, some hundred at a time; rows that can't be documents are named by file and row.

- `.parquet`, `.arrow`: a row is a document.
- `.jsonl`, `.ndjson`: a line is a document, an object with the key `text`.
- `.json`: the same, or one array of such objects.
- `.txt`: documents are separated by blank lines.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cordee.errors import UserError, nearest
from pretrain.data import lines
from pretrain.data.folder import TABLES, kind

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


def documents(file: Path, key: str = "corpus") -> Iterator[dict[str, str]]:
    """`text` and `language` of each document of a corpus's split; the language is "" where there is none.

    Raises:
        UserError: the file can't be read, or holds a row that can't be a document.
    """
    for chunk in chunks(file, key):
        for bad in chunk.bad:
            raise UserError(f"{bad.problem}: {bad.row}", file=f"{file}, {bad.place}", key=key, hint=bad.hint)
        for text, language in zip(chunk.texts, words(chunk.values("language")), strict=True):
            yield {"text": text, "language": language}


def chunks(file: Path, key: str = "source") -> Iterator[Chunk]:
    """A file's documents in chunks of at most `ROWS_AT_ONCE` rows.

    Raises:
        UserError: the file can't be read, or has no column `text`.
    """
    suffix, _ = kind(file)
    if suffix in TABLES:
        yield from _of_tables(file, _parquet(file, key) if suffix == ".parquet" else _arrow(file, key))
        return
    try:
        for batch in batches(lines.rows(file)):
            yield _of_rows(file, batch)
    except (EOFError, OSError, pa.ArrowException) as error:
        raise UserError(f"can't be read to its end: {error}", file=file, key=key) from error


def _of_rows(file: Path, rows: Sequence[tuple[str, lines.Row]]) -> Chunk:
    """A chunk of rows from JSON or text, each a pair of its place and an object, or of its place and what is wrong."""
    good: list[dict[str, Any]] = []
    bad: list[Bad] = []
    for place, row in rows:
        if isinstance(row, lines.Broken):
            bad.append(Bad(row.problem, file, place, row.row))
        elif "text" not in row:
            bad.append(Bad("no 'text'", file, place, lines.beginning(json.dumps(row)), nearest("text", row)))
        elif problem := _problem(row["text"]):
            bad.append(Bad(problem, file, place, lines.beginning(json.dumps(row, ensure_ascii=False))))
        else:
            good.append(row)
    names = dict.fromkeys(name for row in good for name in row if name != "text")
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
    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"can't be read as Parquet: {error}", file=file, key=key) from error
    _check_names(parquet.schema_arrow.names, file, key)
    return parquet


def _check_names(names: list[str], file: Path, key: str) -> None:
    if "text" not in names:
        raise UserError("has no column 'text'", file=file, key=key, hint=nearest("text", names))
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"has two columns {twice!r}", file=file, key=key)


def _parquet(file: Path, key: str) -> Iterator[pa.RecordBatch]:
    parquet = open_parquet(file, key)
    done = 0
    try:
        for batch in parquet.iter_batches(ROWS_AT_ONCE):
            yield batch
            done += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"can't be read as Parquet after row {done}: {error}", file=file, key=key) from error


def _arrow(file: Path, key: str) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow file, as `datasets` saves them (a stream) or in the file format."""
    try:
        with pa.memory_map(str(file)) as opened:
            try:
                reader = pa.ipc.open_stream(opened)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(opened)
            _check_names(reader.schema.names, file, key)
            whole = reader if hasattr(reader, "__iter__") else map(reader.get_batch, range(reader.num_record_batches))
            for batch in whole:
                yield from (batch.slice(start, ROWS_AT_ONCE) for start in range(0, batch.num_rows, ROWS_AT_ONCE))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"can't be read as Arrow: {error}", file=file, key=key) from error


def _of_tables(file: Path, tables: Iterable[pa.RecordBatch]) -> Iterator[Chunk]:
    """Chunks of Arrow's batches of rows, whose types are kept."""
    done = 0
    for batch in tables:
        texts, invalid = _texts(batch.column("text")), _invalid_rows(batch)
        problems = [lines.NO_UTF8 if row in invalid else _problem(text) for row, text in enumerate(texts)]
        bad = [
            Bad(problem, file, f"row {done + row + 1}", lines.beginning(str(texts[row])))
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


def _invalid_rows(batch: pa.RecordBatch) -> set[int]:
    """The rows in which the text of any column is not UTF-8; pyarrow does not check this when it reads."""
    found: set[int] = set()
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            found |= {row for row in range(len(column)) if not _is_valid(column.slice(row, 1))}
    return found


def _is_valid(column: pa.Array) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True
