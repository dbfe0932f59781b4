"""The files and the rows of a source."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cordee.chat.source import Source
from cordee.data.folder import Found, find_files, find_splits
from cordee.data.row import Row
from cordee.data.rows import batches
from cordee.errors import UserError


def files_of(source: Source, key: str = "path") -> Found:
    """The files of a source, which errors name by a key: those that are read, in a fixed order, and those that are not.

    Raises:
        UserError: there is nothing to read, or several splits, none of which is `train`.
    """
    split = source.split
    if split is None and source.files is None and source.path.is_dir():
        known = [name for name in find_splits(source.path, source.subset, key=key) if name]
        if len(known) > 1 and "train" not in known:
            raise UserError(f"holds several splits: {', '.join(known)}", file=source.path, key="split")
        split = "train" if len(known) > 1 else None
    return find_files(source.path, source.files, split, source.subset, key=key)


def selected(source: Source, found: Sequence[Path], seed: int) -> Iterator[list[Row]]:
    """The rows of a source's files in batches: all of them, or as many as `limit` allows."""
    if source.limit is None:
        yield from batches(found)
        return
    if not source.shuffle:
        left = source.limit
        for rows in batches(found):
            yield rows[:left]
            left -= len(rows[:left])
            if not left:
                return
        return
    count = sum(map(len, batches(found)))
    kept = np.zeros(count, dtype=bool)
    kept[np.random.default_rng(seed).permutation(count)[: source.limit]] = True
    at = 0
    for rows in batches(found):
        yield [row for row, is_kept in zip(rows, kept[at : at + len(rows)], strict=True) if is_kept]
        at += len(rows)
