"""Work on many items in parts: each a file of JSON lines that appears whole, all of them joined to one file in the end.

A part is of consecutive items, `<first>-<end>.jsonl` in a folder of its own. An attempt that was interrupted has lost
no more than the part that it was at.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cordee import files

PART = "[0-9]*.jsonl"


def ends(folder: Path, count: int, size: int) -> Iterator[tuple[int, bool]]:
    """The end of each part of `count` items, and whether it is on the disk; parts of an earlier size are kept."""
    names = (path.stem.partition("-") for path in folder.glob(PART))
    there = {int(first): int(end) for first, _, end in names}
    at = 0
    while at < count:
        is_there = at in there
        following = min((first for first in there if first > at), default=count)
        at = there[at] if is_there else min(at + size, following)
        yield at, is_there


def write(folder: Path, first: int, end: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the part of the items from `first` up to `end`."""
    files.write_text(folder / f"{first:09}-{end:09}.jsonl", "".join(map(line, rows)))


def join(folder: Path, file: Path) -> None:
    """Make one file of all parts, in their order; it appears whole."""
    file.parent.mkdir(exist_ok=True)
    beside = file.with_name(f".{file.name}.tmp")
    with beside.open("wb") as whole:
        for path in sorted(folder.glob(PART)):
            with path.open("rb") as part:
                shutil.copyfileobj(part, whole)
        whole.flush()
        os.fsync(whole.fileno())
    beside.replace(file)
    files.sync_folder(file.parent)


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of all parts, in their order."""
    for path in sorted(folder.glob(PART)):
        yield from lines(path)


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that was written here, one after the other; U+2028 ends none."""
    with file.open(encoding="utf-8", newline="\n") as opened:
        yield from map(json.loads, opened)


def line(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"
