"""Which tokens carry loss in the batches that a trainer really makes, and whether packed chats see each other."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed
from transformers import PreTrainedModel

from posttrain.rows import IGNORED, Row, Stops

LEAK_LIMIT = 1e-5
"""How far a logit may move by another chat, in float32."""
EXAMPLES = 3
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class PackedRows:
    """Collates packed rows without flattening them: attention costs rows · length² instead of (rows · length)².

    There is no attention mask in the batch: transformers builds the block-diagonal one from `position_ids`, which
    start again at 0 with each chat. The shape is always the same, so a compiled model is compiled once.
    """

    pad_token_id: int
    length: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors `[rows, length]`: `input_ids`, `labels` (-100: no loss) and `position_ids`."""
        shape = len(examples), self.length
        ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        positions = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(examples):
            used = len(example["input_ids"])
            ids[row, :used] = torch.as_tensor(example["input_ids"])
            labels[row, :used] = torch.as_tensor(example["labels"])
            positions[row, :used] = torch.cat([torch.arange(length) for length in example["seq_lengths"]])
        labels[positions == 0] = IGNORED  # no token of the chat before may predict a chat's first
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


def documents(batch: Batch, pad_token_id: int) -> Iterator[tuple[int, slice]]:
    """Where each chat of a batch stands: its row, and its tokens there; padding is left out."""
    ids = batch["input_ids"]
    for row in range(ids.shape[0]):
        if "position_ids" not in batch:
            yield row, slice(0, int(batch["attention_mask"][row].sum()))
            continue
        starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            if end - start > 1 or int(ids[row, start]) != pad_token_id:
                yield row, slice(start, end)


def counts(batch: Batch) -> dict[str, torch.Tensor]:
    """The `tokens` of a batch without padding, and its `loss_tokens`; both are scalars on the batch's device."""
    if "position_ids" in batch:
        positions = batch["position_ids"]
        # Padding stands at position 0, as the first token of a chat does; only the latter is followed by a position 1.
        tokens = (positions > 0).sum() + ((positions[:, :-1] == 0) & (positions[:, 1:] == 1)).sum()
    else:
        tokens = batch["attention_mask"].sum()
    return {"tokens": tokens, "loss_tokens": (batch["labels"] != IGNORED).sum()}


@dataclass
class Audit:
    """What was found in the batches of a trainer; every count but the first four must be 0."""

    chats: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    packed_with_others: int = 0
    """Chats that share their row with another one."""
    prompt_tokens_with_loss: int = 0
    ends_of_turn_without_loss: int = 0
    answer_tokens_without_loss: int = 0
    chats_without_loss: int = 0
    chats_without_exactly_one_begin: int = 0
    chats_not_in_the_data: int = 0
    """Chats that the trainer cut, joined or changed."""
    examples: list[tuple[list[int], list[int]]] = field(default_factory=list)
    """Of the first chats: the tokens without loss, and those with."""

    @property
    def faults(self) -> dict[str, int]:
        """The counts that must be 0."""
        names = list(vars(self))
        return {name: getattr(self, name) for name in names[names.index("prompt_tokens_with_loss") : -1]}


def audit(batches: Iterable[Batch], rows: Sequence[Row], stops: Stops, pad_token_id: int) -> dict[str, Audit]:
    """Compare each chat of the batches with its row, source by source.

    Returns:
        An `Audit` per file; chats that are in no file stand under "".
    """
    places: dict[bytes, int] = {}
    for number, row in enumerate(rows):
        places.setdefault(_key(row.ids), number)
    found = {str(row.file): Audit() for row in rows}
    for batch in batches:
        chats_in = Counter(row for row, _ in documents(batch, pad_token_id))
        for row_in_batch, where in documents(batch, pad_token_id):
            ids = batch["input_ids"][row_in_batch, where].cpu().numpy().astype(np.int32)
            has_loss = (batch["labels"][row_in_batch, where] != IGNORED).cpu().numpy()
            number = places.get(_key(ids))
            name = "" if number is None else str(rows[number].file)
            entry = found.setdefault(name, Audit())
            entry.packed_with_others += chats_in[row_in_batch] > 1
            _compare(entry, ids, has_loss, None if number is None else rows[number], stops)
            if len(entry.examples) < EXAMPLES:
                entry.examples.append((ids[~has_loss].tolist(), ids[has_loss].tolist()))
    return found


def gather(found: dict[str, Audit]) -> dict[str, Audit]:
    """What all processes found in their shares of the batches, added up."""
    if not torch.distributed.is_initialized():
        return found
    shares: list[dict[str, Audit]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(shares, found)
    return {
        file: Audit(**{name: sum((getattr(share[file], name) for share in shares if file in share), start)
                       for name, start in vars(Audit()).items()})
        for file in sorted({file for share in shares for file in share})
    }  # fmt: skip


def _compare(entry: Audit, ids: np.ndarray, has_loss: np.ndarray, row: Row | None, stops: Stops) -> None:
    """Add one chat of a batch to what was found."""
    entry.chats += 1
    entry.tokens += len(ids)
    entry.loss_tokens += int(has_loss.sum())
    entry.chats_without_loss += not has_loss.any()
    if stops.begin is not None:
        entry.chats_without_exactly_one_begin += int(np.count_nonzero(ids == stops.begin) != 1)
    if row is None:
        entry.chats_not_in_the_data += 1
        return
    entry.ends_of_turn_without_loss += sum(not has_loss[until - 1] for _, until in row.turns)
    entry.prompt_tokens_with_loss += int((has_loss & ~row.must_have_loss).sum())
    entry.answer_tokens_without_loss += int((row.must_have_loss & ~has_loss).sum())


def _key(ids: np.ndarray) -> bytes:
    """A short name for a row's tokens."""
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Leak:
    """How far logits moved when the first chat of a packed row was changed."""

    changed_chat: float
    """The largest change of a logit in the chat that was changed: above 0, or the test says nothing."""
    other_chats: float
    """The largest change in the chats packed behind it: 0 where attention stays within a chat."""


def leak(model: PreTrainedModel, batch: Batch, pad_token_id: int) -> Leak | None:
    """Change the first chat of one packed row and see which logits move; None where the batch has no packed row."""
    ids = batch["input_ids"]
    places = list(documents(batch, pad_token_id))
    packed = [row for row, chats in Counter(row for row, _ in places).items() if chats > 1]
    if not packed:
        return None
    first, *others = [where for row, where in places if row == packed[0]]
    changed = ids.clone()
    changed[packed[0], first] = (ids[packed[0], first] + 1) % model.config.get_text_config().vocab_size
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "input_ids")}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = [
            model(input_ids=tokens.to(model.device), **_to(inputs, model.device), use_cache=False).logits[packed[0]]
            for tokens in (ids, changed)
        ]
    model.train(was_training)
    moved = (logits[0] - logits[1]).abs().amax(-1)
    return Leak(float(moved[first].max()), max(float(moved[where].max()) for where in others))


def _to(inputs: Batch, device: torch.device) -> dict[str, Any]:
    """A batch's tensors on the model's device."""
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
