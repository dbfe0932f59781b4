"""Near duplicates: MinHash of character n-grams (Broder 1997), found by locality-sensitive hashing.

The share of equal entries in two signatures estimates the Jaccard similarity of two texts' sets of n-grams, with a
standard error of at most 0.044. Characters, since not all scripts put blanks between words.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

HASHES = 128
NGRAM = 5
"""Characters of an n-gram; a shorter text is one n-gram."""
FOUND = 0.99
"""With this probability at least two texts of the similarity that is asked for are compared."""
REPRESENTATIVES = 50
"""Rows of a bucket that each further one is compared with, at most."""
_AT_ONCE = 1024
Signatures = npt.NDArray[np.uint32]
_BASE = np.uint64(0x100000001B3)
_DRAWN = np.random.default_rng(0).integers(0, 2**64, (2, HASHES, 1), dtype=np.uint64)
_MULTIPLIERS, _ADDENDS = _DRAWN[0] | np.uint64(1), _DRAWN[1]


def signature(text: str) -> Signatures:
    """`[HASHES]`: for each of so many hash functions the smallest value of an n-gram of the text."""
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32).astype(np.uint64)
    codes = np.pad(codes, (0, max(0, NGRAM - len(codes))))
    count = len(codes) - NGRAM + 1
    grams = np.zeros(count, np.uint64)
    for place in range(NGRAM):
        grams = grams * _BASE + codes[place : place + count]
    grams = mixed(grams)
    smallest = np.full(HASHES, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, count, _AT_ONCE):
        hashed = (_MULTIPLIERS * grams[start : start + _AT_ONCE] + _ADDENDS) >> np.uint64(32)
        smallest = np.minimum(smallest, hashed.min(axis=1).astype(np.uint32))
    return smallest


def mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Numbers whose bits all depend on all bits of the given ones (the finalizer of splitmix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def banding(similarity: float) -> tuple[int, int]:
    """Bands, and entries of each: two texts of the similarity share a band with probability `FOUND` or more.

    That is `1 - (1 - similarity ** entries) ** bands`; the most entries that reach it make the fewest comparisons.
    """
    for entries in range(HASHES, 1, -1):
        bands = HASHES // entries
        if 1 - (1 - similarity**entries) ** bands >= FOUND:
            return bands, entries
    return HASHES, 1


def first_of_cluster(signatures: Signatures, similarity: float) -> npt.NDArray[np.int64]:
    """`[rows]`: the first row of each row's cluster, its own place where it is like none before it.

    Rows that share a band and whose signatures agree in a share of at least `similarity` are linked; a cluster is all
    that links lead to. Memory holds one band at a time, 24 bytes for each row and 4 for each entry of a band.

    Args:
        signatures: `[rows, HASHES]`, which may lie on the disk.
        similarity: from 0 to 1.
    """
    bands, entries = banding(similarity)
    first = np.arange(len(signatures))
    for band in range(bands):
        for bucket in _buckets(signatures[:, band * entries : (band + 1) * entries]):
            kept: list[int] = []
            for row in bucket.tolist():
                like = (one for one in kept if np.mean(signatures[one] == signatures[row]) >= similarity)
                if (other := next(like, None)) is not None:
                    _link(first, row, other)
                elif len(kept) < REPRESENTATIVES:
                    kept.append(row)
    return np.array([_root(first, row) for row in range(len(first))], np.int64)


def _buckets(part: Signatures) -> Iterator[npt.NDArray[np.int64]]:
    """The rows that agree in all entries of a band, where there are several, in their order."""
    keys = np.zeros(len(part), np.uint64)
    for entry in range(part.shape[1]):
        keys = mixed(keys + part[:, entry])
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order[:1]] + np.uint64(1)))
    sizes = np.diff(np.append(starts, len(order)))
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        yield order[start : start + size]


def _root(first: npt.NDArray[np.int64], row: int) -> int:
    while first[row] != row:
        first[row] = first[first[row]]
        row = int(first[row])
    return row


def _link(first: npt.NDArray[np.int64], row: int, other: int) -> None:
    one, two = sorted((_root(first, row), _root(first, other)))
    first[two] = one
