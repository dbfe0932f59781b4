"""Which tokens carry loss in the batches that a trainer really makes, and whether packed chats see each other."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed
from transformers import PreTrainedModel

from cordee.chat.conversations import Conversation
from posttrain.training.settings import IGNORED

if TYPE_CHECKING:
    from posttrain.training.raw_rows import Rows

LEAK_LIMIT = 1e-5
"""How far a logit may move by another chat, in float32."""
EXAMPLES = 3
FAULTS = (
    *("prompt_tokens_with_loss", "ends_of_turn_without_loss", "answer_tokens_without_loss", "chats_without_loss"),
    "chats_not_in_the_data",  # that the trainer cut, joined or changed
)
Batch = Mapping[str, Any]


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


def weights(batch: Batch) -> dict[str, torch.Tensor]:
    """The tokens with loss of a batch, which its `loss` and TRL's other figures are means over: scalars, int64."""
    return dict.fromkeys(("loss", "entropy", "mean_token_accuracy"), counts(batch)["loss_tokens"])


@dataclass
class Audit:
    """What was found in the batches of a trainer; every fault must be 0."""

    chats: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    packed_with_others: int = 0
    """Chats that share their row with another one."""
    faults: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(FAULTS, 0)))
    examples: list[tuple[list[int], list[int]]] = field(default_factory=list)
    """Of the first chats: the tokens without loss, and those with."""
    carried: Counter[tuple[int, int]] = field(default_factory=Counter)
    """How often each answer carried loss, by row (from 1) and message (from 0); told only where rows are compared."""

    def add(self, other: "Audit") -> None:
        """Add what another process found."""
        for name in ("chats", "tokens", "loss_tokens", "packed_with_others", "examples"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults.update(other.faults)
        self.carried.update(other.carried)


def audit(
    batches: Iterable[Batch], chats: Sequence[Conversation], pad_token_id: int, rows: "Mapping[str, Rows] | None" = None
) -> dict[str, Audit]:
    """Compare each chat of the batches with what it was made from, file by file.

    Args:
        batches: as the trainer's collator makes them.
        chats: the chats in tokens.
        pad_token_id: the padding.
        rows: the files' own rows, where those are to be compared with as well.

    Returns:
        An `Audit` per file; chats that are in no file stand under "".
    """
    places: dict[bytes, list[int]] = {}
    found: dict[str, Audit] = {}
    seen: Counter[bytes] = Counter()
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    for at, known in enumerate(chats):
        found.setdefault(str(known.file), Audit())
        for key in (_key(known.ids, known.has_loss), _key(known.ids)):
            places.setdefault(key, []).append(at)
    for batch in batches:
        chats_in = Counter(row for row, _ in documents(batch, pad_token_id))
        for row_in_batch, where in documents(batch, pad_token_id):
            ids = batch["input_ids"][row_in_batch, where].cpu().numpy().astype(np.int32)
            has_loss = (batch["labels"][row_in_batch, where] != IGNORED).cpu().numpy()
            key = next((key for key in (_key(ids, has_loss), _key(ids)) if key in places), b"")
            alike = [chats[at] for at in places.get(key, [])]
            chat = alike[(seen[key] + rank) % len(alike)] if alike else None
            seen[key] += 1  # what stands in the data several times is each of them in turn
            entry = found.setdefault(str(chat.file) if chat else "", Audit())
            entry.packed_with_others += chats_in[row_in_batch] > 1
            _compare(entry, ids, has_loss, chat)
            if chat and rows:
                told = rows[str(chat.file)].compare(chat, ids, has_loss)
                entry.faults.update(told.faults)
                for one in alike:
                    found[str(one.file)].carried.update((one.number, place) for place in told.carried)
            if len(entry.examples) < EXAMPLES:
                entry.examples.append((ids[~has_loss].tolist(), ids[has_loss].tolist()))
    return found


def gather(found: dict[str, Audit]) -> dict[str, Audit]:
    """What all processes found in their shares of the batches, added up."""
    if not torch.distributed.is_initialized():
        return found
    shares: list[dict[str, Audit]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(shares, found)
    total: dict[str, Audit] = {}
    for share in shares:
        for file in sorted(share):
            total.setdefault(file, Audit()).add(share[file])
    return total


def _compare(entry: Audit, ids: np.ndarray, has_loss: np.ndarray, chat: Conversation | None) -> None:
    """Add one chat of a batch to what was found."""
    entry.chats += 1
    entry.tokens += len(ids)
    entry.loss_tokens += int(has_loss.sum())
    faults = entry.faults
    faults["chats_without_loss"] += not has_loss.any()
    if chat is None:
        faults["chats_not_in_the_data"] += 1
        return
    ends = [has_loss[answer.end : answer.until] for answer in chat.answers if answer.until > answer.end]
    faults["ends_of_turn_without_loss"] += sum(not end.any() for end in ends)
    faults["prompt_tokens_with_loss"] += int((has_loss & ~chat.has_loss).sum())
    faults["answer_tokens_without_loss"] += int((chat.has_loss & ~has_loss).sum())


def _key(*tokens: np.ndarray) -> bytes:
    """A short name for a chat's tokens, or for its tokens and its loss."""
    return hashlib.blake2b(b"".join(array.tobytes() for array in tokens), digest_size=16).digest()


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
