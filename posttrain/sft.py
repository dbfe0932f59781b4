"""Supervised fine-tuning on chats with TRL: loss on the assistant's tokens only, packed chats never see each other.

    accelerate launch -m posttrain.sft --config sft.yaml trainer.learning_rate=5e-4

Before the first step every chat is checked, and so are batches of the trainer's own collator: a prompt token with
loss, an end-of-turn without, a chat that is too long: each is an error that names file and row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from cordee import worker
from cordee.config import Config as Keys
from cordee.config import Input, Library
from cordee.cost import Cost
from cordee.errors import Fault, UserError
from cordee.stage import Context
from posttrain.settings import IGNORED, OWNED, TrlConfig, data_cost, training_cost

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import Trainer

    from cordee.chat.conversations import Conversation
    from posttrain.training import Meter

VERSION = 1
CHECKED_BATCHES = 64
SFT_OWNED = {
    **OWNED,
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss", "dataset_text_field", "dataset_kwargs"), ""),
    **dict.fromkeys(("dataset_num_proc", "packing_strategy", "padding_free", "truncation_mode", "eval_packing"), ""),
}
"""Besides: what is trained on, and how chats are packed whole (best-fit decreasing)."""


class Source(Keys):
    """One file of chats."""

    path: Input
    """A .parquet or .jsonl file with `messages`, lists of {role, content, …}, and `tools` where there are any."""
    weight: float = Field(default=1.0, gt=0)
    """How often each chat is seen per epoch: 0.5 takes a random half of them, 2 all of them twice; above 0."""
    ignore: list[str] = Field(default_factory=list)
    """Columns and keys of messages that are left out, though they hold something that the chat template can't use."""


class Config(TrlConfig):
    """What supervised fine-tuning can be told."""

    data: list[Source] = Field(min_length=1)
    """The chats to learn from; at least one file."""
    trainer: Annotated[dict[str, Any], Library("trl.SFTConfig", owned=SFT_OWNED)] = Field(default_factory=dict)
    """Any field of TRL's SFTConfig that the stage doesn't set itself (`learning_rate`, `packing`, `max_length`, …)."""


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """Tokens of all steps, and what they cost to train on; of a file of the user's own they are guessed."""
    tokens = rows = 0.0
    for place, source in enumerate(config.data):
        known = data_cost(source.path, f"data.{place}.path", given, ["messages"])
        if known.tokens is None:
            return training_cost(config, given, None)
        tokens += known.tokens * source.weight
        rows += (known.rows or 0.0) * source.weight
    steps = config.trainer.get("max_steps", -1)
    if steps > 0:
        is_packed, longest = config.trainer.get("packing"), config.trainer.get("max_length") or 1024
        in_row = tokens / rows if rows and not is_packed else longest
        return training_cost(config, given, float(steps * config.global_batch_size * in_row))
    return training_cost(config, given, tokens * float(config.trainer.get("num_train_epochs", 3)))


def build(config: Config, context: Context) -> "tuple[Trainer, Meter]":
    """The trainer, whose batches are checked, and what its batches count for."""
    from posttrain.masks import counts
    from posttrain.training import Meter

    trainer, chats = open_trainer(config, context)
    check_batches(trainer, chats)
    tokens, with_loss = sum(len(chat.ids) for chat in chats), sum(int(chat.has_loss.sum()) for chat in chats)
    context.note(f"{len(chats)} chats, {tokens} tokens, {with_loss / tokens:.1%} of them with loss")
    meter = Meter(
        counts,
        rows=len(chats),
        tokens=tokens,
        sequence_length=trainer.args.max_length,
        varying_shapes=not isinstance(trainer.data_collator, PackedRows),
        metrics={"packed_rows": len(trainer.train_dataset)},
    )
    return trainer, meter


def open_trainer(config: Config, context: Context) -> "tuple[Trainer, list[Conversation]]":
    """TRL's trainer with its data, and the chats that it was made from; used by the proof too."""
    from trl import SFTConfig, SFTTrainer

    from cordee.chat import conversations
    from cordee.chat.templates import Template
    from cordee.compute.model import sequence_limits
    from posttrain import training

    arguments = training.arguments(SFTConfig, config, context)
    if not arguments.max_length:
        raise UserError("must be a number of tokens: no chat is ever cut", key="trainer.max_length")
    model, tokenizer = training.open_model(config)
    template, limits = Template(tokenizer), sequence_limits(model, arguments.max_length)
    chats: list[Conversation] = []
    for place, source in enumerate(config.data):
        found = conversations.tokenize(source.path, template, limits, context.note, source.ignore)
        chats += weigh(found, source.weight, context.seed + place)
    if not chats:
        raise UserError("the weights leave no chat", key="data")
    trainer = training.open_trainer(
        SFTTrainer, config, model, arguments, train_dataset=dataset(chats), processing_class=tokenizer
    )
    if arguments.packing and "flash" not in model.config._attn_implementation:  # noqa: SLF001 - there is no public name
        trainer.data_collator = PackedRows(
            tokenizer.pad_token_id, config.per_device_train_batch_size, arguments.max_length
        )
    return trainer, chats


def weigh(chats: "list[Conversation]", weight: float, seed: int) -> "list[Conversation]":
    """Each row's sequences `weight` times: whole copies, and a random share of the rows for the fraction."""
    import numpy as np

    whole, share = divmod(weight, 1.0)
    numbers = list(dict.fromkeys(chat.number for chat in chats))
    some = {numbers[at] for at in np.random.default_rng(seed).permutation(len(numbers))[: round(share * len(numbers))]}
    return chats * int(whole) + [chat for chat in chats if chat.number in some]


def dataset(chats: "Sequence[Conversation]") -> "Dataset":
    """Chats as TRL takes them when they are tokens already: `input_ids` and `labels`."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    offsets = pa.array(np.cumsum([0, *(len(chat.ids) for chat in chats)]), pa.int32())
    labels = [np.where(chat.has_loss, chat.ids, IGNORED) for chat in chats]
    columns = {"input_ids": [chat.ids for chat in chats], "labels": labels}
    flat = {name: pa.array(np.concatenate(values), pa.int64()) for name, values in columns.items()}
    return Dataset(pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in flat.items()}))


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

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> "dict[str, torch.Tensor]":
        """Tensors `[rows, length]`: `input_ids`, `labels` (-100: no loss) and `position_ids`."""
        import torch

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


def check_batches(trainer: "Trainer", chats: "list[Conversation]") -> None:
    """Look at what the trainer's own collator makes before anything is learnt from it.

    Raises:
        Fault: a batch holds other tokens or other loss than the chats, or packed chats see each other.
    """
    from posttrain import masks

    size, data = trainer.args.per_device_train_batch_size, trainer.train_dataset
    starts = range(0, min(len(data), size * CHECKED_BATCHES), size)
    batches = [trainer.data_collator(list(data.select(range(at, min(at + size, len(data)))))) for at in starts]
    pad = trainer.processing_class.pad_token_id
    for file, found in masks.audit(batches, chats, pad).items():
        if wrong := {name: count for name, count in found.faults.items() if count}:
            raise Fault(f"the trainer's batches are not the chats: {wrong}", file=file)
    if trainer.accelerator.is_main_process:  # with FSDP the others may have no weights yet
        moved = next(filter(None, (masks.leak(trainer.model, batch, pad) for batch in batches)), None)
        if moved and not moved.changed_chat > masks.LEAK_LIMIT:
            raise Fault("another text gives the same logits: no weights?", key="model")
        if moved and moved.other_chats > masks.LEAK_LIMIT:
            raise Fault(f"packed chats see each other: logits moved by {moved.other_chats:g}", key="trainer.packing")


def run(config: Config, context: Context) -> dict[str, Any]:
    """Check, train or go on training, and write the model or the adapter; returns the manifest's metrics."""
    from posttrain.training import fit

    return fit(build, config, context)


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
