"""The header of a data set's `README.md`, as the hub has it, which names subsets, their splits and the files of each.

configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*.parquet}
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from cordee import yaml12
from cordee.data.kinds import kind
from cordee.errors import UserError, nearest

_HEADER = re.compile(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)


def subset(source: Path, name: str | None) -> dict[str, Any] | None:
    """What a header says of the subset of this name, or of the default one; None where it names no subsets.

    Raises:
        UserError: there is no such subset, there are several and no default, or the header can't be read.
    """
    found = _subsets(source)
    if name is not None:
        if name not in found:
            hint = nearest(name, found) if found else "the key is for folders whose README.md names subsets (configs)"
            raise UserError(f"no subset {name!r}", file=source, key="subset", hint=hint)
        return found[name]
    if len(found) < 2:
        return next(iter(found.values()), None)
    defaults = [entry for one, entry in found.items() if one == "default" or entry.get("default") is True]
    if len(defaults) != 1:
        raise UserError(
            f"holds {len(found)} subsets, none of them the default", file=source, key="subset", hint=nearest("", found)
        )
    return defaults[0]


def files_by_split(source: Path, entry: dict[str, Any], below: Sequence[Path]) -> dict[str, list[Path]] | None:
    """The files of a subset by split, out of those below the source; None where the header leaves them to their names.

    Raises:
        UserError: the header gives the files in a form that is not known, or outside the folder.
    """
    told = _told(source, entry)
    if told is None:
        return None
    folder = source / str(entry.get("data_dir") or ".")
    found: dict[str, list[Path]] = {}
    for split, patterns in told:
        matched = [path for one in patterns for path in _matched(folder, one, below)]
        found.setdefault(split, []).extend(dict.fromkeys(matched))
    return {split: files for split, files in found.items() if files}


def patterns(source: Path, name: str | None) -> list[str]:
    """The patterns of a subset's files, relative to the source; none where no header tells them."""
    try:
        entry = subset(source, name)
        told = _told(source, entry) if entry else None
    except UserError:  # what reads the data will say what is wrong
        return []
    folder = PurePosixPath(str(entry.get("data_dir") or ".")) if entry else PurePosixPath()
    return [str(folder / one) for _, some in told or () for one in some]


def _told(source: Path, entry: dict[str, Any]) -> list[tuple[str, list[str]]] | None:
    """The splits of a subset with the patterns of their files; None where the header leaves them to their names."""
    told = entry.get("data_files")
    if told is None:
        return None
    items = told if isinstance(told, list) else [told]
    if all(isinstance(item, str) for item in items):
        items = [{"split": "train", "path": items}]
    found = []
    for item in items:
        path = item.get("path") if isinstance(item, dict) else None
        some = path if isinstance(path, list) else [path]
        if not isinstance(item, dict) or "split" not in item or not all(isinstance(one, str) for one in some):
            problem = "data_files is no pattern, no list of them and no list of {split, path}"
            raise UserError(problem, file=source / "README.md", key=f"configs.{entry['config_name']}")
        found.append((str(item["split"]), [str(one) for one in some]))
    return found


def header(source: Path) -> dict[str, Any]:
    """The header of a folder's `README.md`; empty where there is none.

    Raises:
        UserError: it can't be read.
    """
    file = source / "README.md"
    if not file.is_file():
        return {}
    found = _HEADER.match(file.read_text(encoding="utf-8-sig", errors="replace"))
    try:
        values = yaml12.parse(found[1]) if found else None
    except yaml.YAMLError as error:
        raise UserError(f"its header is no valid YAML: {error}", file=file) from error
    return values if isinstance(values, dict) else {}


def _subsets(source: Path) -> dict[str, dict[str, Any]]:
    """The entries of a header by their names."""
    entries = header(source).get("configs")
    return {
        str(entry["config_name"]): entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and "config_name" in entry
    }


def _matched(folder: Path, pattern: str, below: Sequence[Path]) -> list[Path]:
    """The data files that a pattern names."""
    deep = f"{pattern}/*" if pattern.endswith("**") else pattern  # `**` alone matches folders only
    try:
        matched = set(folder.glob(deep))
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"the header's pattern {pattern!r} can't be followed: {error}", file=folder) from error
    return [path for path in below if kind(path)[0] and path in matched]
