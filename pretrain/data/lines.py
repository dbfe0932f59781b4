"""Rows out of JSON and text files, one at a time, each with its place in the file."""

import bz2
import gzip
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from pretrain.data.folder import kind

SHOWN_CHARACTERS = 80
NO_UTF8, NO_JSON, HALF = "no UTF-8", "no JSON object", "half a character (a lone surrogate)"


@dataclass(frozen=True)
class Broken:
    """A row that can't be read."""

    problem: str
    row: str


Row: TypeAlias = "dict[str, Any] | Broken"


def rows(file: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a `.jsonl`, `.ndjson`, `.json` or `.txt` file, compressed or not, each with its line or number.

    Raises:
        EOFError, OSError, pyarrow.ArrowException: it can't be read to its end.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {".json": _json, ".txt": _paragraphs}
    return readers.get(kind(file)[0], _json_lines)(file)


def beginning(row: str) -> str:
    """The first characters of a row, for messages."""
    return row if len(row) <= SHOWN_CHARACTERS else f"{row[: SHOWN_CHARACTERS - 1]}…"


def _open(file: Path) -> io.BufferedIOBase:
    """A file's bytes, decompressed."""
    _, codec = kind(file)
    if codec == "zstd":
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), codec), 2**20)
    openers: dict[str | None, Any] = {"gzip": gzip.open, "bz2": bz2.open}
    opened: io.BufferedIOBase = openers.get(codec, Path.open)(file, "rb")
    return opened


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """A file's lines without their ends, numbered from 1; U+2028 ends none."""
    with _open(file) as opened:
        for number, line in enumerate(opened, 1):
            yield number, (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")


def _json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(file):
        if line.strip():
            yield f"line {number}", _object(line)


def _json(file: Path) -> Iterator[tuple[str, Row]]:
    """The objects of a `.json` file: one array of them, or a line each."""
    with _open(file) as opened:
        start = opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start != b"[":
        yield from _json_lines(file)
        return
    with _open(file) as opened:
        try:
            rows = json.loads(opened.read())
        except (ValueError, RecursionError) as error:
            yield "all of it", Broken(NO_JSON, str(error))
            return
    for number, row in enumerate(rows, 1):
        yield f"row {number}", _object(json.dumps(row).encode())


def _object(line: bytes) -> Row:
    """The object in a line of JSON, or what is wrong with it."""
    try:
        row = json.loads(line.decode())
        if b"\\ud" in line.lower():  # a lone surrogate can't be written as UTF-8
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError as error:
        problem = NO_UTF8 if isinstance(error, UnicodeDecodeError) else HALF
        return Broken(problem, beginning(line.decode(errors="replace")))
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else Broken(NO_JSON, beginning(line.decode(errors="replace")))


def _paragraphs(file: Path) -> Iterator[tuple[str, Row]]:
    paragraph: list[bytes] = []
    start = 1
    for number, line in _lines(file):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield f"line {start}", _decoded(paragraph)
            paragraph = []
    if paragraph:
        yield f"line {start}", _decoded(paragraph)


def _decoded(lines: list[bytes]) -> Row:
    text = b"\n".join(lines)
    try:
        return {"text": text.decode()}
    except UnicodeDecodeError:
        return Broken(NO_UTF8, beginning(text.decode(errors="replace")))
