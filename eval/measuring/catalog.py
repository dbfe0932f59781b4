"""lm-eval's own tasks, groups and tags by name, read from its YAML files: importing it takes seconds, its index more.

The index is kept in the user's cache folder, and made again when one of the files has changed.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from cordee import files, peek

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""A safe loader, the fast one where PyYAML has it."""
IGNORED = {"__pycache__", ".ipynb_checkpoints"}


@dataclass(frozen=True)
class Entry:
    """What a name stands for."""

    kind: Literal["task", "group", "tag"]
    file: str
    """The task's or the group's file; a tag has none."""
    members: tuple[str, ...] = ()
    """The names in a group or of a tag."""


@functools.cache
def entries() -> Mapping[str, Entry]:
    """All that the installed lm-eval knows; nothing where it is not installed."""
    source = peek.source_of("lm_eval")
    return {} if source is None else _kept(source.parent / "tasks")


def of_files(paths: Iterable[Path]) -> dict[str, Entry]:
    """The tasks, groups and tags of YAML files, as lm-eval finds them: of a name the first file counts."""
    found: dict[str, Entry] = {}
    read: dict[Path, dict[str, Any] | None] = {}
    for path in sorted(paths, key=lambda path: path.as_posix()):
        config = _merged(path, read, ())
        if config is None:
            continue
        is_group = "group" in config and "class" not in config
        name = config.get("group" if is_group else "task")
        if not isinstance(name, str) or name in found:
            continue
        if is_group:
            found[name] = Entry("group", str(path), tuple(members(config)))
            continue
        found[name] = Entry("task", str(path))
        tags = config.get("tag") or []
        for tag in tags if isinstance(tags, list) else [tags]:
            told = found.get(tag, Entry("tag", ""))
            found[tag] = Entry(told.kind, told.file, tuple(sorted({*told.members, name})))
    return found


def members(group: Mapping[str, Any]) -> Iterator[str]:
    """The names in the `task:` list of a group, and in those of groups that are written into it."""
    listed = group.get("task")
    for item in listed if isinstance(listed, list) else []:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict) and isinstance(item.get("task"), list):
            yield from members(item)
        elif isinstance(item, dict) and "dataset_path" not in item:  # else a task that is written into it
            yield str(item.get("group") or item.get("task"))


def _yaml_files(root: Path) -> Iterator[Path]:
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in IGNORED]
        yield from (Path(folder, name) for name in names if name.endswith(".yaml"))


def _merged(path: Path, read: dict[Path, dict[str, Any] | None], above: tuple[Path, ...]) -> dict[str, Any] | None:
    """A file's keys with those of the files that it includes below them; None where lm-eval leaves it out."""
    if path in above:
        return None
    if path not in read:
        read[path] = None
        own = plain(path)
        if own is None:
            return None
        included = own.pop("include", [])
        whole: dict[str, Any] = {}
        for name in included if isinstance(included, list) else [included]:
            below = _merged((path.parent / str(name)).resolve(), read, (*above, path))
            if below is None:
                return None
            whole |= below
        read[path] = whole | own
    return read[path]


def plain(path: Path) -> dict[str, Any] | None:
    """A YAML file's mapping, with functions as their names; None where it is none."""

    class Loader(LOADER):  # type: ignore[misc, valid-type]
        """Keeps the names of functions."""

    Loader.add_constructor("!function", lambda _loader, node: str(node.value))
    try:
        config = yaml.load(path.read_bytes(), Loader=Loader)  # noqa: S506 - the loader is a safe one
    except (OSError, yaml.YAMLError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _kept(root: Path) -> dict[str, Entry]:
    """The entries of a folder, from the cache where its files are as they were."""
    marks = hashlib.sha256()
    for path in sorted(map(str, _yaml_files(root))):
        state = os.stat(path)  # noqa: PTH116 - of 14,000 files
        marks.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cordee" / "lm_eval_tasks.json"
    try:
        kept = json.loads(cache.read_bytes())
        if kept["marks"] == marks.hexdigest():
            return {name: Entry(kind, file, tuple(names)) for name, (kind, file, names) in kept["entries"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there yet, or of another version
    found = of_files(_yaml_files(root))
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        told = {name: list(asdict(entry).values()) for name, entry in found.items()}
        files.write_text(cache, json.dumps({"marks": marks.hexdigest(), "entries": told}))
    except OSError:
        pass  # a home that can't be written costs seconds at each start
    return found
