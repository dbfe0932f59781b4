"""Atomic writes (temporary file, flush, rename), and reading JSON and JSON lines."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from cordee.errors import Fault, UserError

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)
"""What a tokenizer consists of in a Hugging Face folder; all but the first two may be missing."""
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
"""What the names of a model's weights, config and tokenizer end with in a Hugging Face folder."""
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
"""What it has beside these: templates that transformers takes by their name, as `tool_use` for a chat with tools."""
_SEAL = re.compile(rb'\{\n  "sha256": "([0-9a-f]{64})",\n')


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, even if the process is killed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def is_full(folder: Path) -> bool:
    """Whether the disk of a folder has no space for a megabyte, or for another file."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < 2**20 or (found.f_files > 0 and found.f_favail == 0)


def can_write(folder: Path) -> bool:
    """Whether a folder's storage takes a file of 1 MB, and gives it back."""
    beside, content = folder / f".probe.{os.getpid()}", os.urandom(2**20)
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        is_whole = beside.read_bytes() == content
        beside.unlink()
    except OSError:
        return False
    return is_whole


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON in the same way; NaN is refused, because it is no JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        Fault: the file can't be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Fault(f"can't be read as JSON: {error}", file=path) from error


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object whose first key, `sha256`, is the digest of the bytes that follow its line."""
    body = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).removeprefix("{\n") + "\n"
    digest = hashlib.sha256(body.encode()).hexdigest()
    write_text(path, f'{{\n  "sha256": "{digest}",\n{body}')


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote, without the digest.

    Raises:
        Fault: the file can't be read, or a bit of it was changed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Fault(f"can't be read: {error.strerror}", file=path) from error
    seal = _SEAL.match(content)
    body = content[seal.end() :] if seal else b""
    if not seal or hashlib.sha256(body).hexdigest().encode() != seal[1]:
        raise Fault("is damaged: its content differs from its own SHA-256", file=path)
    found: dict[str, Any] = json.loads(b"{\n" + body)
    return found


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON objects, one a line, up to the first line that is none or was cut off; a missing file has none."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def cut_lines(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Shorten a file of JSON objects, one a line, to those before the first that is not kept, or was cut off."""
    kept = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(row, dict) or not is_kept(row):
                break
            kept += len(line)
    with path.open("rb+") as file:
        file.truncate(kept)
        os.fsync(file.fileno())


def read_rows(path: Path) -> dict[int, dict[str, Any]]:
    """Read JSON lines that the user or another program wrote, by the number of their line; blank lines are no rows.

    Raises:
        UserError: a line is no JSON object.
    """
    # U+2028 in a text is no end of line, as `splitlines` would have it
    return rows_of(path.read_bytes().split(b"\n"), path)


def rows_of(lines: Iterable[bytes], path: Path) -> dict[int, dict[str, Any]]:
    """The JSON objects in the first lines of a file, as `read_rows` has them."""
    rows: dict[int, dict[str, Any]] = {}
    wrong: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            wrong[number] = f"is no JSON: {error}"
            continue
        if isinstance(row, dict):
            rows[number] = row
        else:
            wrong[number] = "is no JSON object"
    if wrong:
        first, *others = wrong
        more = f"; so are {len(others)} more lines, next {', '.join(map(str, others[:2]))}" if others else ""
        raise UserError(f"line {first} {wrong[first]}{more}", file=path)
    return rows


def inside(name: str) -> str:
    """The name of a file in a record, such as a manifest, relative to the record's folder.

    Raises:
        ValueError: it leads out of that folder.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of its folder")
    return name


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries: otherwise a rename can be lost in a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below, and the folder itself."""
    for path in sorted(folder.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    sync_folder(folder)


@contextmanager
def replaced(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write to, whose files then appear in `folder`, flushed.

    One that is not there yet appears at once. In one that is, each file appears whole, and `last`, without which no
    reader takes the folder for what it is, goes first and comes last.
    """
    is_new = not folder.exists()
    beside = folder.with_name(f".{folder.name}.saving") if is_new else folder / ".saving"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    sync_tree(beside)
    if is_new:
        beside.rename(folder)
        sync_folder(folder.parent)
        return
    (folder / last).unlink(missing_ok=True)
    for path in sorted(walk(beside), key=lambda path: path.name == last):
        place = folder / path.relative_to(beside)
        place.parent.mkdir(exist_ok=True)
        path.replace(place)
        sync_folder(place.parent)
    shutil.rmtree(beside)
    sync_folder(folder)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_files(folder: Path) -> list[str]:
    """The files of a tokenizer that a folder has, as paths within it."""
    found = [*(folder / name for name in TOKENIZER_FILES), *sorted(folder.glob(CHAT_TEMPLATES))]
    return [path.relative_to(folder).as_posix() for path in found if path.is_file()]


def copy(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy files, given as paths within a folder, to the same paths in another."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def walk(folder: Path) -> Iterator[Path]:
    """The files below a folder in a fixed order, linked folders included, except links to a folder that holds them."""
    yield from sorted(_below(folder, ()))


def _below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    here = folder.resolve()
    if here in above:
        return
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            yield from _below(path, (*above, here))
        elif path.is_file():
            yield path
