"""Rows that repeat another one, in the same source or in one before it: the first stays."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from posttrain.mixing import minhash
from posttrain.mixing.scan import DUPLICATE, KEPT, NEAR_DUPLICATE, Scanned
from posttrain.mixing.settings import Deduplicate

SAID = {DUPLICATE: "repeats another row", NEAR_DUPLICATE: "nearly repeats another row"}
Places = npt.NDArray[np.int64]


def mark(sources: Sequence[Scanned], how: Deduplicate, similarity: float, folder: Path) -> Places:
    """Give rows that repeat another one their verdict.

    Args:
        sources: of which rows that stayed are compared; those of the first come first.
        how: rows with equal normalised texts, or near duplicates too.
        similarity: of near duplicates.
        folder: for signatures, which are mapped from the disk.

    Returns:
        `[rows of all sources]`: the row that each repeats, one source after the other; its own place for all others.
    """
    verdicts = np.concatenate([one.columns["verdict"] for one in sources])
    first = np.arange(len(verdicts))
    if how != "off":
        rows = np.flatnonzero(verdicts == KEPT)
        digests = np.concatenate([one.columns["digest"] for one in sources])[rows]
        _, at, inverse = np.unique(digests, return_index=True, return_inverse=True)
        first[rows] = rows[at[inverse]]
        verdicts[rows[first[rows] != rows]] = DUPLICATE
    rows = np.flatnonzero(verdicts == KEPT)
    if how == "near" and len(rows):
        found = rows[minhash.first_of_cluster(_signatures(sources, rows, folder), similarity)]
        first[rows] = found
        verdicts[rows[found != rows]] = NEAR_DUPLICATE
    for one, part in zip(sources, np.split(verdicts, np.cumsum([len(one) for one in sources])[:-1]), strict=True):
        one.columns["verdict"] = part
    return first


def _signatures(sources: Sequence[Scanned], rows: Places, folder: Path) -> minhash.Signatures:
    """`[rows, HASHES]`: the signatures of some rows, mapped from a file."""
    found: minhash.Signatures = np.memmap(
        folder / "signatures.bin", mode="w+", dtype=np.uint32, shape=(len(rows), minhash.HASHES)
    )
    start = written = 0
    for path in (path for one in sources for path in one.signatures):
        part = np.load(path, mmap_mode="r")
        wanted = rows[(rows >= start) & (rows < start + len(part))] - start
        found[written : written + len(wanted)] = part[wanted]
        start, written = start + len(part), written + len(wanted)
    return found


def place(sources: Sequence[Scanned], row: int) -> str:
    """Where a row of all sources stands, in words."""
    for one in sources:
        if row < len(one):
            return f"row {row + 1} of {one.name}"
        row -= len(one)
    raise IndexError(row)
