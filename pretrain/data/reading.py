"""Documents out of Parquet, JSON-lines and text files, one at a time; what is wrong is named by file and row.

- `.parquet`: a row is a document; row groups are read as they are needed.
- `.jsonl`: a line is a document, an object with the key `text`.
- `.txt`: documents are separated by blank lines.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cordee.errors import UserError, nearest

SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("language", pa.string()),
        ("language_name", pa.string()),
        ("script", pa.string()),
        ("article", pa.int64()),
        ("source", pa.string()),
        ("licence", pa.string()),
    ]
)
"""The columns that a document has; all but `text` may be missing in what is read."""

BYTES_PER_TOKEN = 3.0
"""Bytes of UTF-8 in a token, where only a guess is possible (before there is a tokenizer)."""

SUFFIXES = (".parquet", ".jsonl", ".txt")
ROWS_AT_ONCE = 256

Document = dict[str, Any]
T = TypeVar("T")


def find_files(source: Path, key: str = "source") -> tuple[list[Path], list[Path]]:
    """The files of a source that hold documents, in a fixed order, and those beside them that don't.

    Raises:
        UserError: the source is no file of a known kind, or a folder without any.
    """
    kinds = ", ".join(SUFFIXES)
    if source.is_file() and source.suffix in SUFFIXES:
        return [source], []
    if not source.is_dir():
        problem = f"is no {kinds} file and no folder of them" if source.exists() else "there is no such file or folder"
        raise UserError(problem, file=source, key=key)
    below = sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith("."))
    found = [path for path in below if path.suffix in SUFFIXES]
    if not found:
        raise UserError(f"the folder holds no {kinds} file", file=source, key=key)
    return found, [path for path in below if path.suffix not in SUFFIXES]


def split_file(corpus: Path, split: str) -> Path:
    """The file of a corpus artifact's split, `train` or `heldout`.

    Raises:
        UserError: there is none.
    """
    file = corpus / f"{split}.parquet"
    if not file.is_file():
        raise UserError(f"holds no {file.name}", file=corpus, key="corpus", hint="give a corpus of pretrain.corpus")
    return file


def documents(source: Path, extra: Sequence[str] = (), key: str = "source") -> Iterator[Document]:
    """Every document of a source: the columns of `SCHEMA`, and those of `extra` as they stand.

    Raises:
        UserError: a file can't be read, or a document is not what it should be.
    """
    readers = {".parquet": _parquet_rows, ".jsonl": _json_rows, ".txt": _text_rows}
    columns = [*SCHEMA.names, *(name for name in extra if name not in SCHEMA.names)]
    for file in find_files(source, key)[0]:
        for place, row in readers[file.suffix](file, columns, key):
            yield {**{name: row.get(name) for name in columns}, **_checked(row, f"{file}, {place}", key)}


def batches(items: Iterable[T], size: int = ROWS_AT_ONCE) -> Iterator[list[T]]:
    """The items in lists of `size`, the last one shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def open_parquet(file: Path, key: str) -> pq.ParquetFile:
    """Open a Parquet file with a column `text`.

    Raises:
        UserError: it can't be read (cut off, no Parquet), or has no such column.
    """
    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"can't be read as Parquet: {error}", file=file, key=key) from error
    names = parquet.schema_arrow.names
    if "text" not in names:
        raise UserError("has no column 'text'", file=file, key=key, hint=nearest("text", names))
    return parquet


def _checked(row: Document, place: str, key: str) -> Document:
    """The columns of `SCHEMA`, each of its type."""
    text, article = row.get("text"), row.get("article")
    if "text" not in row:
        raise UserError("has no 'text'", file=place, key=key, hint=nearest("text", map(str, row)))
    if article is not None and (isinstance(article, bool) or not isinstance(article, int)):
        raise UserError(f"'article' must be a whole number, not {article!r}", file=place, key=key)
    checked: Document = {"article": article}
    for name in SCHEMA.names:
        if name == "article":
            continue
        value = row.get(name)
        if not isinstance(value, str | None):
            raise UserError(f"{name!r} must be text, not {type(value).__name__}", file=place, key=key)
        try:
            (value or "").encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name!r} holds half a character: {error.reason}", file=place, key=key) from error
        checked[name] = value or ""
    if not text or text.isspace():
        raise UserError("the text is empty", file=place, key=key)
    return checked


def _parquet_rows(file: Path, columns: list[str], key: str) -> Iterator[tuple[str, Document]]:
    parquet = open_parquet(file, key)
    present = [name for name in columns if name in parquet.schema_arrow.names]
    done = 0
    try:
        for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=present):
            for row, document in enumerate(batch.to_pylist(), done + 1):
                yield f"row {row}", document
            done += batch.num_rows
    except UnicodeDecodeError as error:
        problem = f"no UTF-8 in a text among the {ROWS_AT_ONCE} after row {done}"
        raise UserError(problem, file=file, key=key) from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"can't be read as Parquet after row {done}: {error}", file=file, key=key) from error


def _json_rows(file: Path, _columns: list[str], key: str) -> Iterator[tuple[str, Document]]:
    for number, line in _lines(file, key):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"no JSON: {error.msg}", file=f"{file}, line {number}", key=key) from error
        if not isinstance(row, dict):
            raise UserError("no JSON object", file=f"{file}, line {number}", key=key)
        yield f"line {number}", row


def _text_rows(file: Path, _columns: list[str], key: str) -> Iterator[tuple[str, Document]]:
    paragraph: list[str] = []
    start = 1
    for number, line in _lines(file, key):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield f"line {start}", {"text": "\n".join(paragraph)}
            paragraph = []
    if paragraph:
        yield f"line {start}", {"text": "\n".join(paragraph)}


def _lines(file: Path, key: str) -> Iterator[tuple[int, str]]:
    """A file's lines without their ends, numbered from 1."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                problem = f"no UTF-8 at byte {error.start + 1} of the line"
                raise UserError(problem, file=f"{file}, line {number}", key=key) from error
