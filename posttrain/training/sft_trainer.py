"""Around TRL's `SFTTrainer`: rows that are tokens, the collator of packed rows, the check of the first batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer
from trl import SFTTrainer

from cordee.chat.conversations import Conversation
from cordee.errors import Fault, UserError
from posttrain.training import masks
from posttrain.training.settings import CHECKED_BATCHES, IGNORED


class TokenTrainer(SFTTrainer):
    """TRL's trainer for rows that are tokens already."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


@dataclass(frozen=True)
class PackedRows:
    """Collates packed rows without flattening them: attention costs rows · length² instead of (rows · length)².

    There is no attention mask in the batch: transformers builds the block-diagonal one from `position_ids`, which
    start again at 0 with each chat. The shape is always the same (the last batch of an epoch is filled up with rows of
    padding), so a compiled model is compiled once.
    """

    pad_token_id: int
    rows: int
    length: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors `[rows, length]`: `input_ids`, `labels` (-100: no loss) and `position_ids`."""
        shape = self.rows, self.length
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


def check_batches(trainer: Trainer, chats: Sequence[Conversation]) -> None:
    """Look at what the trainer's own collator makes before anything is learnt from it.

    Raises:
        Fault: a batch holds other tokens or other loss than the chats.
        UserError: packed chats see each other: the model's architecture can't be packed.
    """
    size, data = trainer.args.per_device_train_batch_size, trainer.train_dataset
    checked = min(len(data), size * CHECKED_BATCHES)
    # not `select`, which hashes all that the dataset reads from
    rows = [data[at] for at in range(checked)]
    batches = [trainer.data_collator(rows[at : at + size]) for at in range(0, checked, size)]
    pad = trainer.processing_class.pad_token_id
    expected = [chats[at] for row in data.with_format(None)[:checked]["sequences"] for at in row]
    for file, found in masks.audit(batches, expected, pad).items():
        if wrong := {name: count for name, count in found.faults.items() if count}:
            raise Fault(f"the trainer's batches are not the chats: {wrong}", file=file)
    if trainer.accelerator.is_main_process:  # with FSDP the others may have no weights yet
        moved = next(filter(None, (masks.leak(trainer.model, batch, pad) for batch in batches)), None)
        if moved and not moved.changed_chat > masks.LEAK_LIMIT:
            raise Fault("another text gives the same logits: no weights?", key="model")
        if moved and moved.other_chats > masks.LEAK_LIMIT:
            problem = f"packed chats see each other in this model: logits moved by {moved.other_chats:g}"
            raise UserError(problem, key="trainer.packing", hint="packing: false")
