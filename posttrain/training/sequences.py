"""The sequences that a training sees: those of all its sources, how often each, and which share a row."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset

from cordee.chat.tokenized import Tokenized
from posttrain.training.settings import IGNORED

T = TypeVar("T")
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sequences(Sequence[T], Generic[T]):
    """Sequences of all sources, some of them several times."""

    parts: tuple[Tokenized, ...]
    places: Places
    """`[sequences]`: their places among those of all sources, one source after the other."""
    read: Callable[[Tokenized, int], T]
    """Gives one sequence of a source."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: Any) -> Any:
        return self.read(*self.place(at))

    def __iter__(self) -> Iterator[T]:
        return (self[at] for at in range(len(self)))

    def place(self, at: int) -> tuple[Tokenized, int]:
        """The source of a sequence, and its place there."""
        place = int(self.places[at])
        part = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self.parts[part], place - int(self._starts[part])

    def sources(self) -> Places:
        """`[sequences]`: which of `parts` each is of."""
        found: Places = np.searchsorted(self._starts, self.places, side="right") - 1
        return found

    @cached_property
    def _starts(self) -> Places:
        return _starts(self.parts)

    def lengths(self, *lists: str) -> Places:
        """`[sequences]`: tokens in these lists of each."""
        whole = np.concatenate([sum(part.lengths(name) for name in lists) for part in self.parts])
        found: Places = whole[self.places]
        return found

    def texts(self) -> Places:
        """`[sequences]`: hashes of their token ids."""
        found: Places = np.concatenate([part.texts() for part in self.parts])[self.places]
        return found

    def floats(self, name: str) -> npt.NDArray[np.float64]:
        """`[sequences]`: numbers that the rows tell; NaN where one does not."""
        found: npt.NDArray[np.float64] = np.concatenate([part.floats(name) for part in self.parts])[self.places]
        return found

    @property
    def digest(self) -> str:
        """Of the token ids, where they carry loss, and how often each sequence is seen."""
        told = [part.report["digest"] for part in self.parts]
        return hashlib.sha256(" ".join(told).encode() + self.places.tobytes()).hexdigest()


def split(
    parts: tuple[Tokenized, ...],
    weights: Sequence[float],
    share: float,
    seed: int,
    read: Callable[[Tokenized, int], T],
) -> tuple[Sequences[T], Sequences[T]]:
    """The sequences to train on, and those of a share of the rows that is held out.

    Rows with the same prompt, of chats those with the same token ids, are held out together, or none of them is, from
    whichever sources they come: what is measured on held-out rows is then of prompts that were not trained on.

    Args:
        parts: the sources.
        weights: how often each source's rows are seen: whole copies, and a random share of the rows for the rest.
        share: of each source's prompts (of its chats) that no source before has, to be held out; their rows once each.
            Where this is less than half a prompt of every source, one is held out, unless it is the only one.
        seed: draws the rows.
        read: gives a sequence of a source.
    """
    rows_of = [_rows(part) for part in parts]
    is_out_of = _held_out(parts, rows_of, share, seed)
    seen, heldout = [], []
    sources = zip(_starts(parts)[:-1], parts, weights, rows_of, is_out_of, strict=True)
    for at, (start, part, weight, row_of, is_out) in enumerate(sources):
        among = np.flatnonzero(~is_out)
        whole, rest = divmod(weight, 1.0)
        again = np.zeros(len(is_out), dtype=bool)
        again[among[_drawn(len(among), rest, seed + at)]] = True
        everything = np.arange(len(part), dtype=np.int64)
        seen += [start + np.tile(everything[~is_out[row_of]], int(whole)), start + everything[again[row_of]]]
        heldout.append(start + everything[is_out[row_of]])
    return Sequences(parts, np.concatenate(seen), read), Sequences(parts, np.concatenate(heldout), read)


def _rows(part: Tokenized) -> Places:
    """`[sequences]`: which of the source's rows each is of, counted from 0."""
    _, row_of = np.unique(np.stack([part.numbers("file"), part.numbers("number")]), axis=1, return_inverse=True)
    found: Places = row_of.reshape(-1)
    return found


def _held_out(
    parts: Sequence[Tokenized], rows_of: Sequence[Places], share: float, seed: int
) -> list[npt.NDArray[np.bool_]]:
    """`[rows]` of each source: whether a row is held out."""
    counts = [int(row_of.max()) + 1 for row_of in rows_of]
    starts = np.cumsum([0, *counts])
    is_out = np.zeros(starts[-1], dtype=bool)
    if share:
        rows = np.concatenate([start + row_of for start, row_of in zip(starts, rows_of, strict=False)])
        first_of = _first_rows(rows, np.concatenate([part.prompts() for part in parts]))
        for at in range(len(parts)):
            firsts = np.unique(first_of[(first_of >= starts[at]) & (first_of < starts[at + 1])])
            is_out[firsts[_drawn(len(firsts), share, (seed, at, 1))]] = True
        every = np.unique(first_of)
        if not is_out.any() and len(every) > 1:
            is_out[np.random.default_rng((seed, 2)).choice(every)] = True
        is_out = is_out[first_of]
    return np.split(is_out, starts[1:-1])


def _first_rows(rows: Places, prompts: Places) -> Places:
    """`[rows]`: the first row that shares a prompt with each, or with one that does, and so on.

    Args:
        rows: `[sequences]`, the row of each, counted from 0.
        prompts: `[sequences]`, the same number for the same prompt.
    """
    _, prompts = np.unique(prompts, return_inverse=True)
    found = np.arange(rows.max() + 1)
    while True:
        of_prompt = np.full(len(rows), len(rows))
        np.minimum.at(of_prompt, prompts, found[rows])
        nearer = found.copy()
        np.minimum.at(nearer, rows, of_prompt[prompts])
        if (nearer == found).all():
            return found
        found = nearer


def _starts(parts: Sequence[Tokenized]) -> Places:
    return np.cumsum([0, *map(len, parts)])


def _drawn(count: int, share: float, seed: Any) -> npt.NDArray[np.bool_]:
    """`[count]`: a random share of so many."""
    found = np.zeros(count, dtype=bool)
    found[np.random.default_rng(seed).permutation(count)[: round(share * count)]] = True
    return found


def packed(lengths: Places, length: int) -> list[list[int]]:
    """Sequences put together into rows of at most `length` tokens: best fit, the longest first.

    Ding et al. 2024, arXiv 2404.10830. Each sequence goes into the row with the least space that holds it; a bit set
    of the spaces that there are finds it.
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    spaces = 0  # bit `n` is set where a row has space for `n` tokens
    for at in np.argsort(-lengths, kind="stable").tolist():
        needed = int(lengths[at])
        fitting = spaces >> needed
        if fitting:
            space = needed + (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, row = length, len(rows)
            rows.append([])
        rows[row].append(at)
        if left := space - needed:
            with_space.setdefault(left, []).append(row)
            spaces |= 1 << left
    return rows


def dataset(sequences: Sequences[Any], max_length: int, *, packing: bool) -> Dataset:
    """Sequences as TRL takes them, one or several in a row: `input_ids`, `labels` and `seq_lengths`.

    Each row is read when it is asked for.
    """
    rows = packed(sequences.lengths("ids"), max_length) if packing else [[at] for at in range(len(sequences))]

    def read(batch: dict[str, list[list[int]]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"input_ids": [], "labels": [], "seq_lengths": []}
        for row in batch["sequences"]:
            whole = [ids_and_labels(*sequences.place(at)) for at in row]
            found["input_ids"].append(np.concatenate([ids for ids, _ in whole]))
            found["labels"].append(np.concatenate([labels for _, labels in whole]))
            found["seq_lengths"].append([len(ids) for ids, _ in whole])
        return found

    offsets = pa.array(np.cumsum([0, *map(len, rows)]), pa.int64())
    flat = pa.array([at for row in rows for at in row], pa.int64())
    index = pa.LargeListArray.from_arrays(offsets, flat)
    return Dataset(pa.table({"sequences": index})).with_transform(read)


def ids_and_labels(part: Tokenized, at: int) -> tuple[Places, Places]:
    """`[seq]` each, int64: the token ids, and the same where they carry loss."""
    ids = part.items("ids", at).astype(np.int64)
    labels = np.full(len(ids), IGNORED)
    for first, until in part.items("loss", at).reshape(-1, 2):
        labels[first:until] = ids[first:until]
    return ids, labels
