"""Rows out of JSON and text files, one at a time.

- JSON, whatever the file is called: a line is a row; or one array of objects; or objects that go over several lines,
  one behind the other. A file's only object is its only row, unless it holds the rows: see `_list_in`. A list of
  messages stands for a row with the column `messages`.
- `.txt`: the lines between two blank lines are a row, with the column `text`.
"""

import bz2
import codecs
import gzip
import io
import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from cordee.data.kinds import kind
from cordee.data.row import COMMA, HALF, NO_JSON, NO_UTF8, Broken, Row, UnreadableError, beginning, shown

HEAD_BYTES = 2**16
CHUNK_BYTES = 2**20
LONGEST_WORD = 16
"""More characters than `-Infinity` or an escaped surrogate pair have."""
BOM = b"\xef\xbb\xbf"
MESSAGE = (("role", "content"), ("role", "tool_calls"), ("from", "value"))
"""Keys that a message has, in a list of them that stands without its column."""
_LONG_MESSAGE = re.compile(rb'\[\s*\{\s*"(role|from)"\s*:\s*"\w*"\s*,\s*"(content|value)"')
_ARRAY = re.compile(rb"\[\s*([{\]]|\[\s*\{|$)")
_AFTER = re.compile(r"[^\s,]")
_DECODER = json.JSONDecoder()


def open_file(file: Path) -> io.BufferedReader:
    """A file's bytes, decompressed. Compressed parts that stand one behind the other are read as one.

    Raises:
        OSError: there is no such file.
    """
    _, codec = kind(file)
    openers: dict[str | None, Any] = {"gzip": gzip.open, "bz2": bz2.open, "zstd": _open_zstd}
    return io.BufferedReader(openers.get(codec, io.FileIO)(file), HEAD_BYTES)


def _open_zstd(file: Path) -> Any:
    return pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")


def paragraphs(file: Path, opened: io.BufferedReader) -> Iterator[Row]:
    """The rows of a text file."""
    paragraph: list[bytes] = []
    start = 1
    for number, line in chain(_lines(opened), [(0, b"")]):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield Row(file, start, _text(b"\n".join(paragraph)), "line")
            paragraph = []


def json_rows(file: Path, opened: io.BufferedReader) -> Iterator[Row]:
    """The rows of a JSON file.

    Raises:
        UnreadableError: an array, or an object that goes over several lines, is not JSON.
    """
    head = opened.peek(HEAD_BYTES).removeprefix(BOM).lstrip()
    is_array = _ARRAY.match(head) or (head[:1] == b"[" and kind(file)[0] == ".json")
    if is_array and not _begins_with_message(head):
        return _values(file, opened, is_array=True)
    line, end, _ = head.partition(b"\n")
    goes_on = end and line.rstrip().endswith((b"{", b"[", b",", b":")) and not _is_object(line)
    return _unwrapped(_values(file, opened, is_array=False) if goes_on else _json_lines(file, opened))


def _lines(opened: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """A file's lines without their ends, numbered from 1; U+2028 ends none."""
    for number, line in enumerate(opened, 1):
        yield number, (line.removeprefix(BOM) if number == 1 else line).rstrip(b"\r\n")


def _text(text: bytes) -> dict[str, Any] | Broken:
    try:
        return {"text": text.decode()}
    except UnicodeDecodeError:
        return Broken(NO_UTF8, beginning(text.decode(errors="replace")))


def _json_lines(file: Path, opened: io.BufferedReader) -> Iterator[Row]:
    for number, line in _lines(opened):
        if line.strip():
            yield Row(file, number, _object(line), "line")


def _object(line: bytes) -> dict[str, Any] | Broken:
    """The object in a line of JSON, or what is wrong with it."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return Broken(NO_UTF8, beginning(line.decode(errors="replace")))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        has_comma = line.rstrip().endswith(b",") and _is_object(line)
        return Broken(COMMA if has_comma else NO_JSON, beginning(text))
    return _checked(value, text)


def _is_object(line: bytes) -> bool:
    """Whether a line begins with a whole object, and at most a comma is behind it."""
    try:
        value, end = _DECODER.raw_decode(text := line.decode().strip())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and text[end:].strip() in ("", ",")


def _begins_with_message(head: bytes) -> bool:
    """Whether an array begins with a message, which may be longer: it is a chat then, and does not hold the rows."""
    try:
        first, _ = _DECODER.raw_decode(head[1:].decode(errors="ignore").lstrip())
    except (ValueError, RecursionError):
        return _LONG_MESSAGE.match(head) is not None
    return _is_message(first)


def _is_message(value: Any) -> bool:
    """Whether a value is a message of a chat, in OpenAI's form or in ShareGPT's."""
    return isinstance(value, dict) and any(who in value and what in value for who, what in MESSAGE)


def _checked(value: Any, source: str) -> dict[str, Any] | Broken:
    """A value, decoded from this JSON, as a row."""
    if isinstance(value, list) and value and _is_message(value[0]):
        value = {"messages": value}
    if not isinstance(value, dict):
        return Broken(NO_JSON, beginning(source))
    if "\\u" in source and "\\ud" in source.lower():  # a lone surrogate can't be written as UTF-8
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Broken(HALF, beginning(source))
    return value


def _values(file: Path, opened: io.BufferedReader, *, is_array: bool) -> Iterator[Row]:
    """The values of an array, or those that stand one behind the other, of which few are held at a time."""
    text = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    number, line, held, size, is_over = 0, 1, "", CHUNK_BYTES, False
    if is_array:
        line += sum(before == b"\n" for before in iter(lambda: opened.read(1), b"["))
    while not is_over:
        read = opened.read(size)
        is_over = not read
        held += text.decode(read, is_over)
        found, rest, is_broken = _whole_values(held, is_over)
        is_over, at = is_over or is_broken, 0
        for start, end, value in found:
            number, line, at = number + 1, line + held.count("\n", at, start), start
            yield Row(file, number if is_array else line, _valid(value, held[start:end]), "row" if is_array else "line")
        line, held = line + held.count("\n", at, rest), held[rest:]
        size = CHUNK_BYTES if found else 2 * size  # so that a long value is tried a few times only
    if held.strip() != ("]" if is_array else ""):
        problem, more_lines = _why(held)
        raise UnreadableError(f"no JSON in line {line + more_lines}: {problem}")


def _whole_values(held: str, is_over: bool) -> tuple[list[tuple[int, int, Any]], int, bool]:
    """The values that end within a text, each with its start and end; where the rest begins; whether it is no JSON."""
    found: list[tuple[int, int, Any]] = []
    at = 0
    while after := _AFTER.search(held, at):
        at = after.start()
        try:
            value, end = _DECODER.raw_decode(held, at)
        except json.JSONDecodeError as error:
            # where a text is cut off, the error is in a string or at the last word
            is_cut = error.msg.startswith("Unterminated string") or error.pos > len(held) - LONGEST_WORD
            return found, at, not is_cut and held[at] != "]"
        except (ValueError, RecursionError):
            return found, at, True
        if end == len(held) and not is_over:  # a number may go on
            return found, at, False
        found.append((at, end, value))
        at = end
    return found, len(held), False


def _valid(value: Any, source: str) -> dict[str, Any] | Broken:
    """`_checked`, for what was decoded with `surrogateescape`."""
    if not source.isascii():
        try:
            source.encode()
        except UnicodeEncodeError:
            return Broken(NO_UTF8, shown(source))
    return _checked(value, source)


def _why(rest: str) -> tuple[str, int]:
    """What is wrong at the beginning of a text, and how many lines below."""
    if not rest.strip():
        return "the array does not end", 0
    try:
        _DECODER.raw_decode(rest)
    except json.JSONDecodeError as error:
        return (error.msg, error.lineno - 1) if rest[0] != "]" else ("more stands behind the array", 0)
    except (ValueError, RecursionError) as error:
        return str(error), 0
    return "more stands behind it", 0


def _unwrapped(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, or those in the list that a file's only object holds."""
    first = list(islice(rows, 2))
    held = _list_in(first[0].values) if len(first) == 1 else []
    if not held:
        yield from chain(first, rows)
    for number, values in enumerate(held, 1):
        yield Row(first[0].file, number, values)


def _list_in(values: dict[str, Any] | Broken) -> list[dict[str, Any]]:
    """The objects that an object holds in a list, as `{"data": [{…}, …]}` does, or none.

    The list is the object's only value, or is called `data`. A list of messages, with `role` or `from`, is a chat.
    """
    if isinstance(values, Broken):
        return []
    held = values.get("data", next(iter(values.values())) if len(values) == 1 else None)
    if not isinstance(held, list) or not all(isinstance(item, dict) for item in held):
        return []
    return [] if any(key in item for item in held[:1] for key in ("role", "from")) else held
