"""The splits of a data set, and the files of each.

They are told by a header in `README.md` (`hub`), by a `DatasetDict` (`saved`), or else by the names of files and
folders: `train-00000-of-00002.parquet`, `dev.jsonl`, `test/0.csv`. Where some tell of another split and none of
`train`, the others are `train`.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from cordee.data import hub, saved
from cordee.errors import UserError, nearest
from cordee.files import walk

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in names of files and folders → the split that they mean, as the hub reads them (`datasets.data_files`)."""

_WORDS = re.compile(r"[-._ 0-9]+")
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")


def of_source(source: Path, documents: Sequence[Path], name: str | None = None) -> dict[str, list[Path]]:
    """Split → its files in their order; "" for files of which nothing tells the split.

    Args:
        source: a file, or a folder.
        documents: the files that are read of it.
        name: the subset, where a header names several; None for the default one.

    Raises:
        UserError: there is no such subset, there are several and no default, or a header or list can't be read.
    """
    entry = hub.subset(source, name)
    if entry is None:
        return by_names(source, documents)
    below = [path for path in walk(source) if not any(part[0] == "." for part in path.relative_to(source).parts)]
    told = hub.files_by_split(source, entry, below)
    folder = source / str(entry.get("data_dir") or ".")
    return by_names(source, [path for path in documents if folder in path.parents]) if told is None else told


def by_names(source: Path, documents: Sequence[Path]) -> dict[str, list[Path]]:
    """The same, without regard to a header."""
    if source.is_dir() and (names := saved.splits(source)):
        return {name: [path for path in documents if source / name in path.parents] for name in names}
    base = source if source.is_dir() else source.parent
    found: dict[str, list[Path]] = {}
    for path in documents:
        found.setdefault(_split(path.relative_to(base)), []).append(path)
    if len(found) > 1 and "" in found and not any(name.startswith("train") for name in found):
        found["train"] = found.pop("")
    order = [*dict.fromkeys(SPLITS.values()), *sorted(name for name in found if name), ""]
    return {name: found[name] for name in dict.fromkeys(order) if name in found}


def choose(source: Path, found: dict[str, list[Path]], split: str) -> list[Path]:
    """The files of a split, by its name or another word for it (`dev`); where nothing tells of splits, all is `train`.

    Raises:
        UserError: there is no such split.
    """
    if list(found) == [""] and split == "train":
        return found[""]
    meant = SPLITS.get(split.lower())
    same = [name for name in found if meant and SPLITS.get(name.lower()) == meant]
    if split not in found and not same:
        known = [name for name in found if name]
        hint = nearest(split, known) if known else "no name of a file or folder tells of splits"
        raise UserError(f"no split {split!r}", file=source, key="split", hint=hint)
    return found[split if split in found else same[0]]


def _split(file: Path) -> str:
    """The split that a file's name tells of, or else the name of its nearest folder that does; "" where none does."""
    shard = _SHARD.match(file.name)
    if shard and any(word in SPLITS for word in _WORDS.split(shard[1].lower())):
        return SPLITS.get(shard[1].lower(), shard[1])  # `train_sft-00000-of-00003.parquet` is of `train_sft`
    for part in reversed(file.parts):
        for word in _WORDS.split(part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return ""
