"""SHA-256 of files and folders, each file hashed once.

A process keeps what it has hashed for as long as the file's size, times and inode stay the same. In the job, the runner
passes on to the stage's processes what it has hashed of the stage's inputs (`known`, `trust`). For `plan`, hashes of
files outside the store are also kept on disk (`Kept`).
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cordee import files
from cordee.config import Input
from cordee.errors import Fault

_SETTLED_S = 1.0
"""The hash of a file that was changed more recently is not kept: a further change may not show in its times."""
_known: dict[str, list[Any]] = {}
"""What this process has hashed or was told: by path, the file's mark and, last, its SHA-256."""


def of_file(path: Path) -> str:
    """The SHA-256 of a file's content."""
    key, mark = str(path.resolve()), _mark(path)
    if _known.get(key, [None])[:-1] == mark:
        return str(_known[key][-1])
    is_settled = time.time() - path.stat().st_mtime > _SETTLED_S
    found = files.sha256(path)
    if is_settled:
        _known[key] = [*mark, found]
    return found


def of_content(path: Path, hash_file: Callable[[Path], str] = of_file, *, names: Iterable[str] | None = None) -> str:
    """The SHA-256 of a file's content or a folder's file names and their hashes, and of the files that it names.

    `names` are the files of a folder that count, relative to it; None: all.
    """
    further = path.further_files() if isinstance(path, Input) else []
    if path.is_dir():
        inside = files.walk(path) if names is None else sorted(path / name for name in names)
        listed: list[Any] = [[item.relative_to(path).as_posix(), hash_file(item)] for item in inside]
        listed += [[item.name, hash_file(item)] for item in further]
    elif further:
        listed = [hash_file(item) for item in (path, *further)]
    else:
        return hash_file(path)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def known(paths: Iterable[str]) -> dict[str, list[Any]]:
    """What this process has hashed of these files and folders, as JSON for `trust`."""
    roots = [str(Path(path).resolve()) for path in paths]
    return {key: value for key, value in _known.items() if any(key == r or key.startswith(f"{r}/") for r in roots)}


def trust(told: Mapping[str, list[Any]]) -> None:
    """Take over what another process has hashed; a file that was changed since is hashed again."""
    _known.update(told)


def moved(old: Path, new: Path) -> None:
    """Keep what is known of the files in a folder that was renamed."""
    before, after = f"{old.resolve()}/", f"{new.resolve()}/"
    for key in [key for key in _known if key.startswith(before)]:
        _known[after + key.removeprefix(before)] = _known.pop(key)


def _mark(path: Path) -> list[int]:
    """What changes with a file's content."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


class Kept:
    """Hashes of files outside the store, kept in a file so that `plan` reads each of them once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.known: dict[str, list[Any]] = files.read_sealed(path)
        except Fault:  # not there yet, or damaged: everything is hashed again
            self.known = {}
        self.changed = False

    def of(self, path: Path, names: Iterable[str] | None = None) -> str:
        """The hash of a file's or folder's content; of a folder, that of all files or of those that are named."""
        return of_content(path, self._of_file, names=names)

    def _of_file(self, path: Path) -> str:
        key, mark = str(path.resolve()), _mark(path)
        if self.known.get(key, [None])[:-1] == mark:
            return str(self.known[key][-1])
        found = of_file(path)
        if key in _known:
            self.known[key] = _known[key]
            self.changed = True
        return found

    def save(self) -> None:
        """Write the file, where something was hashed; a store that can't be written yet does not stop planning."""
        if self.changed and os.access(self.path.parent, os.W_OK):
            files.write_sealed(self.path, self.known)
