"""Which files of a folder hold documents, and which ones beside them do not.

Read are `.parquet`, `.arrow`, `.jsonl`, `.ndjson`, `.json` and `.txt`, the last four compressed too (`.gz`, `.zst`,
`.bz2`). Not read are hidden files and folders, and text files that are named as a licence or a readme. Plain `.json`
and `.txt` files beside data files describe these (`dataset_infos.json`, `urls.txt`) and are not read either. Patterns
given by the user take the place of these rules.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cordee.errors import UserError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Suffix → pyarrow's name of the codec."""

TABLES = (".parquet", ".arrow")
LINES = (".jsonl", ".ndjson", ".json", ".txt")
KINDS = (*TABLES, *LINES)

DESCRIBES_DATA = re.compile(
    r"((un)?licen[cs]es?|copying|read_?me|data_?(set)?_?(card|sheet))([._-].*)?"
    r"|(notices?|copyright|authors|contribut(ors|ing)|citation|change_?log|credits)(\.[^.]*)?"
    r"|(dataset_(infos?|dict)|state)\.json",
    re.IGNORECASE,
)
"""Names of text files that describe data: `LICENSE-MIT.txt`, `README.de.txt`, `notice.txt`, `dataset_infos.json`."""

REASONS = (HIDDEN, DESCRIBES, BESIDE, OTHER) = ("hidden", "licence or readme", "beside data files", "of another kind")


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


def kind(file: Path) -> tuple[str, str | None]:
    """The suffix that says how a file is read (one of `KINDS`, or ""), and its codec where it is compressed."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in file.suffixes)]
    codec = COMPRESSIONS.get(last)
    suffix = before if codec else last
    return (suffix if suffix in (LINES if codec else KINDS) else ""), codec


def find_files(source: Path, patterns: Sequence[str] | None = None, key: str = "source") -> Found:
    """The files of a source that hold documents, and those beside them that do not.

    Args:
        source: a file, or a folder of files at any depth.
        patterns: globs below the folder; if given, they alone say which files are read.
        key: the key that names the source, for errors.

    Raises:
        UserError: the source is no file of a known kind or a folder without any, or a pattern finds nothing to read.
    """
    kinds = ", ".join(KINDS)
    if source.is_file() and kind(source)[0]:
        if patterns:
            raise UserError("is a single file, and files chooses among those of a folder", file=source, key="files")
        return Found([source])
    if not source.is_dir():
        problem = f"is no {kinds} file and no folder of them" if source.exists() else "there is no such file or folder"
        raise UserError(problem, file=source, key=key)
    below = sorted(path for path in source.rglob("*") if path.is_file())
    found = _chosen(source, below, patterns) if patterns else _by_rule(source, below)
    if not found.documents:
        raise UserError(f"the folder holds no {kinds} file{_instead(found)}", file=source, key=key)
    return found


def shown(source: Path, found: Found) -> str:
    """What is read of a folder and what is not, in one line."""
    count = len(found.documents)
    line = f"reads {count} file{'s' if count != 1 else ''} of {source}: {_names(source, found.documents)}"
    skipped = [f"{len(paths)} {reason} ({_names(source, paths)})" for reason, paths in found.skipped.items()]
    return f"{line}; not read: {', '.join(skipped)} (the key files chooses others)" if skipped else line


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
        matched = {path for path in source.glob(pattern) if path.is_file()}
        if not matched:
            raise UserError(f"no file matches {pattern!r}", file=source, key="files")
        if unknown := sorted(path for path in matched if not kind(path)[0]):
            problem = f"{_names(source, unknown)} (by {pattern!r}) can't be read; files may be {', '.join(KINDS)}"
            raise UserError(problem, file=source, key="files")
        named |= matched
    rest = [path for path in below if path not in named]
    return Found(sorted(named), {"not named by files": rest} if rest else {})


def _by_rule(source: Path, below: Sequence[Path]) -> Found:
    """The files that hold documents by this module's rules."""
    reasons = {path: _reason(path.relative_to(source)) for path in below}
    ranks = {path: _rank(path) for path, reason in reasons.items() if not reason}
    strongest = min(ranks.values(), default=0)
    documents: list[Path] = []
    skipped: dict[str, list[Path]] = {}
    for path, reason in reasons.items():
        if reason or ranks[path] > strongest:
            skipped.setdefault(reason or BESIDE, []).append(path)
        else:
            documents.append(path)
    return Found(documents, {reason: skipped[reason] for reason in REASONS if reason in skipped})


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
    """0 for data, 1 for plain JSON, 2 for text: a folder's documents are in the files of its lowest rank."""
    suffix, codec = kind(file)
    return {".txt": 2, ".json": 0 if codec else 1}.get(suffix, 0)
