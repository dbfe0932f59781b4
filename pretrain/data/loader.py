"""Documents to training rows: memory-mapped ids, packed without cutting, in an order that is computed.

A *piece* is a document, or a part of one that is longer than a row. Pieces are packed into rows by best fit,
longest first (Ding et al. 2024, arXiv 2404.10830): hardly any padding, and no document is cut that fits a row.
Which *lengths* share a row follows from the lengths alone, so every epoch has the same number of rows, and row
`k` of the endless stream is found without going through those before it. Which *pieces* it holds is drawn anew
each epoch from (seed, source, epoch). Attention and loss stay within a piece, so it does not matter with whom it
shares a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from cordee import files
from cordee.errors import Fault, UserError

IGNORED = -100
"""The label of a position without loss."""

SHOWN = 3
"""Documents that an error names."""
IDS_AT_ONCE = 2**24

Ints = npt.NDArray[np.int64]
Row = Ints
"""A packed training row, `[pieces in the row]`: indices into a split's pieces."""


@dataclass(frozen=True)
class Split:
    """The documents of one file of tokens, in pieces of at most `sequence_length` tokens."""

    name: str
    """`train` or `heldout`."""
    ids: npt.NDArray[np.unsignedinteger]
    """`[tokens]`, memory-mapped."""
    starts: Ints
    """`[pieces]`: where each one begins in `ids`."""
    lengths: Ints
    """`[pieces]`, in tokens."""
    documents: Ints
    """`[pieces]`: the document that each one is of."""
    rows: tuple[Ints, ...]
    """The slots of each row; slot `i` is the `i`-th longest piece."""

    def epoch(self, key: Sequence[int] | None) -> tuple[Ints, Ints]:
        """The piece in each slot and the order of the rows, drawn from `key`; in the order of the file for None.

        Raw draws of PCG64 are sorted: numpy guarantees their bits across versions, unlike those of `permutation`.
        """
        count = len(self.lengths)
        draws = (
            np.random.PCG64(list(key)).random_raw(count + len(self.rows)) if key else np.zeros(count + len(self.rows))
        )
        return np.lexsort((draws[:count], -self.lengths)), np.argsort(draws[count:], kind="stable")

    def tokens(self, row: Row) -> int:
        """Tokens in a row, without padding."""
        return int(self.lengths[row].sum())


def open_split(
    folder: Path, split: str, sequence_length: int, long_documents: Literal["error", "split"], key: str
) -> Split:
    """Map one split (`train` or `heldout`) of a tokens artifact and pack it.

    Parts of a cut document overlap by one token, so that each token but a document's first is predicted once.

    Raises:
        UserError: the folder holds no tokens, or a document is too long; names `key`.
        Fault: the files do not fit each other.
    """
    for name in ("tokens.json", f"{split}.bin", f"{split}.offsets.npy"):
        if not (folder / name).is_file():
            raise UserError(f"is no tokens artifact: it has no {name}", file=folder, key=key)
    dtype = np.dtype(files.read_json(folder / "tokens.json")["dtype"]).newbyteorder("<")
    offsets = np.load(folder / f"{split}.offsets.npy", mmap_mode="r", allow_pickle=False)
    size = (folder / f"{split}.bin").stat().st_size
    if offsets[0] != 0 or (np.diff(offsets) < 1).any() or offsets[-1] * dtype.itemsize != size:
        raise Fault(
            f"its offsets do not fit {split}.bin of {size} bytes", file=folder / f"{split}.offsets.npy", key=key
        )
    ids = np.memmap(folder / f"{split}.bin", dtype, "r") if size else np.empty(0, dtype)
    sizes = np.diff(offsets)
    if long_documents == "error" and (long := np.flatnonzero(sizes > sequence_length)).size:
        shown = ", ".join(f"document {n + 1} has {sizes[n]}" for n in long[:SHOWN].tolist())
        problem = (
            f"{long.size} of {len(sizes)} {split} documents exceed sequence_length={sequence_length}: {shown} tokens"
        )
        raise UserError(problem, file=folder, key=key, hint='raise it, or say long_documents: "split"')
    parts = np.maximum(1, -(-(sizes - 1) // (sequence_length - 1)))
    documents = np.repeat(np.arange(len(sizes)), parts)
    part = np.arange(len(documents)) - np.repeat(np.cumsum(parts) - parts, parts)
    begins = part * (sequence_length - 1)
    lengths = np.minimum(sizes[documents] - begins, sequence_length)
    rows = _pack(-np.sort(-lengths), sequence_length)
    return Split(split, ids, np.asarray(offsets)[documents] + begins, lengths, documents, rows)


def require_ids_below(rows: int, split: Split, folder: Path, key: str) -> None:
    """See that no document holds an id that an embedding table of so many rows does not have.

    The ids are read only where the tokenizer has such an id: it may hold tokens that no text gives.

    Raises:
        UserError: documents do; says how many, and which is the first.
    """
    if files.read_json(folder / "tokens.json")["vocab_size"] <= rows:
        return
    wrong: dict[int, int] = {}
    for start in range(0, len(split.ids), IDS_AT_ONCE):
        ids = split.ids[start : start + IDS_AT_ONCE]
        places = np.flatnonzero(ids >= rows)
        documents = split.documents[np.searchsorted(split.starts, start + places, side="right") - 1]
        wrong = dict(zip(documents[::-1].tolist(), ids[places][::-1].tolist(), strict=True)) | wrong
    if wrong:
        shown = ", ".join(f"document {document + 1} holds {wrong[document]}" for document in sorted(wrong)[:SHOWN])
        held = f"{len(wrong)} {split.name} documents hold ids"
        problem = f"{held} beyond the {rows} rows of the model's embedding table: {shown}"
        raise UserError(problem, file=folder, key=key, hint="train on tokens of the model's own tokenizer")


def _pack(lengths: Ints, capacity: int) -> tuple[Ints, ...]:
    """Best fit: slots of falling length into rows of `capacity` tokens; returns the slots of each row."""
    rows: list[list[int]] = []
    by_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    free_sizes = 0  # bit `r` is set where a row with `r` free tokens is open
    for slot, length in enumerate(lengths.tolist()):
        fitting = free_sizes >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = by_free[free].pop()
            free_sizes ^= (not by_free[free]) << free
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(slot)
        if free > length:
            by_free[free - length].append(row)
            free_sizes |= 1 << (free - length)
    return tuple(np.array(row, dtype=np.int64) for row in rows)


class Stream:
    """An endless stream of a split's rows: each epoch holds every piece once, in an order of its own."""

    def __init__(self, split: Split, seed: int, source: int) -> None:
        self.split = split
        self._epoch = lru_cache(maxsize=2)(lambda epoch: split.epoch((seed, source, epoch)))

    def row(self, index: int) -> Row:
        """The pieces of row `index`."""
        epoch, place = divmod(index, len(self.split.rows))
        pieces, order = self._epoch(epoch)
        row: Row = pieces[self.split.rows[order[place]]]
        return row


@dataclass(frozen=True)
class Batch:
    """Input of the model; each field is `[rows, sequence_length]`, int64."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    """Counted from 0 in each piece: attention separates the pieces of a row by it."""
    labels: torch.Tensor
    """The token that follows; `IGNORED` at the last token of a piece and in padding."""

    def to(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three on a device, in the order in which the model takes them."""
        return self.input_ids.to(device), self.position_ids.to(device), self.labels.to(device)


def assemble(rows: Sequence[tuple[Split, Row]], num_rows: int, sequence_length: int, pad_token_id: int) -> Batch:
    """Read rows from the disk, padded to `sequence_length` tokens and to `num_rows` rows."""
    shape = (num_rows, sequence_length)
    ids, labels = np.full(shape, pad_token_id, np.int64), np.full(shape, IGNORED, np.int64)
    positions = np.tile(np.arange(sequence_length), (num_rows, 1))
    for line, (split, row) in enumerate(rows):
        at = 0
        for start, length in zip(split.starts[row].tolist(), split.lengths[row].tolist(), strict=True):
            piece = split.ids[start : start + length]
            ids[line, at : at + length] = piece
            labels[line, at : at + length - 1] = piece[1:]
            positions[line, at : at + length] = np.arange(length)
            at += length
        positions[line, at:] = np.arange(sequence_length - at)
    return Batch(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(labels))
