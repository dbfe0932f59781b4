"""Which files of a folder hold rows, and which ones beside them do not.

Read are `.parquet`, `.arrow`, `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` and `.txt`, the last six compressed too
(`.gz`, `.zst`, `.bz2`). Not read are hidden files and folders, and text files that are named as a licence or a readme.
Plain `.csv`, `.tsv`, `.json` and `.txt` files describe the data files beside them and in folders below
(`languages.csv`, `dataset_infos.json`, `urls.txt`), each kind those before it, and are not read either. Of a data set
that `datasets` saved, its own files are read, in its order. Patterns given by the user take the place of these rules.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cordee.data import saved, splits
from cordee.data.kinds import DELIMITED, KINDS, kind
from cordee.errors import UserError
from cordee.files import walk

DESCRIBES_DATA = re.compile(
    r"((un)?licen[cs]es?|copying|read_?me|data_?(set)?_?(card|sheet))([._-].*)?"
    r"|(notices?|copyright|authors|contribut(ors|ing)|citation|change_?log|credits)(\.[^.]*)?"
    r"|(dataset_(infos?|dict)|state)\.json",
    re.IGNORECASE,
)
"""Names of text files that describe data: `LICENSE-MIT.txt`, `README.de.txt`, `notice.txt`, `dataset_infos.json`."""

HIDDEN, DESCRIBES, BESIDE, OTHER = "hidden", "licence or readme", "beside data files", "of another kind"
UNNAMED, UNASKED = "not of the data set that is saved here", "of other splits"
REASONS = (HIDDEN, DESCRIBES, BESIDE, UNNAMED, UNASKED, OTHER)


@dataclass(frozen=True)
class Found:
    """The files of a source."""

    documents: list[Path]
    """Those to read, in a fixed order."""
    skipped: dict[str, list[Path]] = field(default_factory=dict)
    """Those that are not read, by reason."""

    @property
    def num_skipped(self) -> int:
        """How many files are not read."""
        return sum(map(len, self.skipped.values()))


def find_files(
    source: Path,
    patterns: Sequence[str] | None = None,
    split: str | None = None,
    name: str | None = None,
    key: str = "source",
) -> Found:
    """The files of a source that hold rows, and those beside them that do not.

    Args:
        source: a file, or a folder of files at any depth.
        patterns: globs below the folder; if given, they alone say which files are read.
        split: the split to read; None for all.
        name: the subset to read, where the header of a folder's `README.md` names several; None for the default one
            if a split is asked for, else for all.
        key: the key that names the source, for errors.

    Raises:
        UserError: the source is no file of a known kind or a folder without any, a pattern finds nothing to read, or
            there is no such split or subset.
    """
    found = _found(source, patterns, key)
    if split is None and name is None:
        return found
    if patterns:
        raise UserError("chooses by itself: give one of files, and split or subset", file=source, key="files")
    by_split = splits.of_source(source, found.documents, name)
    if split is None:
        chosen = [path for files in by_split.values() for path in files]
    else:
        chosen = splits.choose(source, by_split, split)
    if not chosen:
        raise UserError(f"the split holds no {', '.join(KINDS)} file", file=source, key="split")
    rest = {**found.skipped, UNASKED: found.documents}
    skipped = {reason: [path for path in rest.get(reason, []) if path not in chosen] for reason in REASONS}
    return Found(chosen, {reason: paths for reason, paths in skipped.items() if paths})


def find_splits(source: Path, name: str | None = None, key: str = "source") -> dict[str, list[Path]]:
    """Split → its files, for a source that is read without one; "" for files of which nothing tells the split.

    Raises:
        UserError: as `find_files` does, and where a header names several subsets, none of them the default.
    """
    return splits.of_source(source, _found(source, None, key).documents, name)


def shown(source: Path, found: Found) -> str:
    """What is read of a folder and what is not, in one line."""
    count = len(found.documents)
    line = f"reads {count} file{'s' if count != 1 else ''} of {source}: {_names(source, found.documents)}"
    skipped = [f"{len(paths)} {reason} ({_names(source, paths)})" for reason, paths in found.skipped.items()]
    return f"{line}; not read: {', '.join(skipped)} (the key files chooses others)" if skipped else line


def splits_shown(source: Path, found: Found) -> str:
    """The splits that names tell of, with their number of files, in one line; "" where they are not several."""
    by_split = splits.by_names(source, found.documents)
    named = [f"{len(files)} of {name}" for name, files in by_split.items() if name]
    if len(named) < 2:
        return ""
    return f"by their names the files are of several splits, all read: {', '.join(named)} (the key split chooses)"


def _found(source: Path, patterns: Sequence[str] | None, key: str) -> Found:
    """The files of a source, of all its splits."""
    kinds = ", ".join(KINDS)
    if source.is_file() and kind(source)[0]:
        if patterns:
            raise UserError("is a single file, and files chooses among those of a folder", file=source, key="files")
        return Found([source])
    if not source.is_dir():
        problem = f"is no {kinds} file and no folder of them" if source.exists() else "there is no such file or folder"
        raise UserError(problem, file=source, key=key)
    _require_targets(source, key)
    below = list(walk(source))
    found = _chosen(source, below, patterns) if patterns else _by_rule(source, below)
    if not found.documents:
        raise UserError(f"the folder holds no {kinds} file{_instead(found)}", file=source, key=key)
    return found


def _require_targets(source: Path, key: str) -> None:
    """See that no data file of a folder is a link to a file that is gone: its rows would be missing in silence."""
    for path in source.rglob("*"):
        if path.is_symlink() and not path.exists() and not _reason(path.relative_to(source)):
            raise UserError(f"is a link to {path.readlink()}, which is not there", file=path, key=key)


def _instead(found: Found) -> str:
    """What an otherwise empty folder holds."""
    reasons = [f"{len(paths)} {reason}" for reason, paths in found.skipped.items()]
    return f" to read, only {', '.join(reasons)}" if reasons else ""


def _names(source: Path, paths: Sequence[Path]) -> str:
    """The first three of some files, relative to their folder."""
    first = ", ".join(path.relative_to(source).as_posix() for path in paths[:3])
    return f"{first}, …" if len(paths) > 3 else first


def _chosen(source: Path, below: Sequence[Path], patterns: Sequence[str]) -> Found:
    """The files that the user's patterns name."""
    named: set[Path] = set()
    for pattern in patterns:
        matched = set(source.glob(pattern)).intersection(below)
        if not matched:
            raise UserError(f"no file matches {pattern!r}", file=source, key="files")
        if unknown := sorted(path for path in matched if not kind(path)[0]):
            problem = f"{_names(source, unknown)} (by {pattern!r}) can't be read; files may be {', '.join(KINDS)}"
            raise UserError(problem, file=source, key="files")
        named |= matched
    rest = [path for path in below if path not in named]
    return Found(sorted(named), {"not named by files": rest} if rest else {})


def _by_rule(source: Path, below: Sequence[Path]) -> Found:
    """The files that hold rows by this module's rules."""
    reasons = {path: _reason(path.relative_to(source)) for path in below}
    sets = _saved(path for path in below if reasons[path] != HIDDEN)
    strongest: dict[Path, int] = {}
    for path in (path for path in below if not reasons[path]):
        for folder in path.parents:
            strongest[folder] = min(_rank(path), strongest.get(folder, 99))
    for path in (path for path in below if not reasons[path]):
        if path.suffix == ".arrow" and path not in sets.get(path.parent, [path]):
            reasons[path] = UNNAMED
        elif _rank(path) > strongest[path.parent]:
            reasons[path] = BESIDE
    documents = [path for path in below if not reasons[path]]
    for folder, files in sets.items():
        places = [place for place, path in enumerate(documents) if path.parent == folder and path in files]
        for place, path in zip(places, files, strict=True):
            documents[place] = path
    skipped = {reason: [path for path in below if reasons[path] == reason] for reason in REASONS}
    return Found(documents, {reason: paths for reason, paths in skipped.items() if paths})


def _saved(files: Iterable[Path]) -> dict[Path, list[Path]]:
    """The folders that `datasets` saved a data set to, with its files in their order."""
    folders = [path.parent for path in files if path.name == saved.STATE]
    return {folder: found for folder in folders if (found := saved.data_files(folder)) is not None}


def _reason(file: Path) -> str:
    """Why a file, by its path below the source, holds no documents; "" where it does."""
    if any(part.startswith(".") for part in file.parts):
        return HIDDEN
    suffix, codec = kind(file)
    name = file.name.removesuffix(file.suffix) if codec else file.name
    is_prose = not suffix or suffix in (".txt", ".json")
    if is_prose and (DESCRIBES_DATA.fullmatch(name) or "licenses" in map(str.lower, file.parts[:-1])):
        return DESCRIBES
    return "" if suffix else OTHER


def _rank(file: Path) -> int:
    """0 for data, 1 for plain CSV, 2 for plain JSON, 3 for text; what is higher describes what is lower."""
    suffix, codec = kind(file)
    if suffix == ".txt":
        return 3
    return 0 if codec else 2 if suffix == ".json" else int(suffix in DELIMITED)
