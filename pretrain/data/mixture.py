"""Several sources in one stream of samples, by weight; sample `k` is a pure function of `k` and the seed.

Sources alternate in a fixed pattern of `PERIOD` samples, in which each appears in proportion to its weight, as evenly
as possible. A sample is a row, of the same number of tokens for every source, so that weights are shares of the tokens,
except for padding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cordee.errors import UserError
from pretrain.data.loader import Row, Split, Stream

PERIOD = 10_000
"""Samples in the pattern; weights are met to one part in `PERIOD`."""


@dataclass(frozen=True)
class Sample:
    """A row of the training stream."""

    source: int
    row: Row


class Mixture:
    """The training stream: sample `k` for every `k`, a pure function of the seed."""

    def __init__(self, splits: Sequence[Split], weights: Sequence[float], seed: int) -> None:
        """Raises `UserError` where a weight is too small to be met."""
        self.splits = tuple(splits)
        self.shares = np.array(weights) / np.sum(weights)
        self._streams = [Stream(split, seed, source) for source, split in enumerate(splits)]
        self._pattern = _pattern(self.shares)
        counts = np.eye(len(splits), dtype=np.int64)[self._pattern]  # [PERIOD, sources]
        self._before = np.cumsum(counts, axis=0) - counts
        self._per_period = counts.sum(axis=0)
        for source in np.flatnonzero(self._per_period == 0):
            raise UserError(f"is less than 1/{PERIOD} of the mixture", key=f"data.{source}.weight")

    def sample(self, index: int) -> Sample:
        """Sample `index` of the stream."""
        period, place = divmod(index, len(self._pattern))
        source = int(self._pattern[place])
        row = self._streams[source].row(int(period * self._per_period[source] + self._before[place, source]))
        return Sample(source, row)

    def epochs(self, samples: int) -> list[float]:
        """Epochs of each source after `samples` samples."""
        period, place = divmod(samples, len(self._pattern))
        counts = period * self._per_period + self._before[place]
        return [float(count / len(split.rows)) for count, split in zip(counts, self.splits, strict=True)]

    def tokens(self, samples: Sequence[Sample]) -> list[int]:
        """Tokens of each source in these samples, without padding."""
        totals = [0] * len(self.splits)
        for sample in samples:
            totals[sample.source] += self.splits[sample.source].tokens(sample.row)
        return totals

    def labels(self, samples: Sequence[Sample]) -> int:
        """Labels in these samples: a token for each but the first of each piece."""
        return sum(self.tokens(samples)) - sum(len(sample.row) for sample in samples)


def digest(ids: bytes) -> int:
    """48 bits of a hash of a row's ids; digests are summed, so that order and grouping of rows do not matter."""
    return int.from_bytes(hashlib.blake2b(ids, digest_size=6).digest(), "little")


def _pattern(shares: np.ndarray) -> np.ndarray:
    """`[PERIOD]`: the source of each sample, always the one that is furthest below its share."""
    pattern, counts = np.zeros(PERIOD, dtype=np.int64), np.zeros(len(shares))
    if len(shares) > 1:
        for index in range(PERIOD):
            source = int(np.argmax(shares * (index + 1) - counts))
            pattern[index], counts[source] = source, counts[source] + 1
    return pattern
