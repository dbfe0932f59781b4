"""Supervised fine-tuning on chats with TRL: loss on the assistant's tokens only, packed chats never see each other.

    accelerate launch -m posttrain.sft --config sft.yaml trainer.learning_rate=5e-4

Before the first step every chat is checked, and so are batches of the trainer's own collator: a prompt token with
loss, an end-of-turn without, a chat that is too long: each is an error that names file and row.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from cordee import worker
from cordee.config import Library
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.stage import Context
from posttrain.training.cost import data_cost, training_cost
from posttrain.training.settings import SFT_OWNED, TrlConfig

if TYPE_CHECKING:
    from transformers import Trainer

    from cordee.chat.conversations import Conversation
    from posttrain.training.metrics import TrainingData
    from posttrain.training.sequences import Sequences

VERSION = 6


class Config(TrlConfig):
    """What supervised fine-tuning can be told."""

    trains_chats: ClassVar[bool] = True
    trainer: Annotated[dict[str, Any], Library("trl.SFTConfig", owned=SFT_OWNED)] = Field(default_factory=dict)
    """Any field of TRL's SFTConfig that the stage doesn't set itself (`learning_rate`, `packing`, `max_length`, …)."""


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """Tokens of all steps, and what they cost to train on; of a file of the user's own they are guessed."""
    seen = data_cost(config, given, "chats")
    if config.trainer.get("packing") and config.trainer.get("max_steps", -1) > 0 and seen.rows:
        return training_cost(config, given, seen.rows * config.longest)
    return training_cost(config, given, seen.tokens)


def build(config: Config, context: Context) -> "tuple[Trainer, TrainingData]":
    """The trainer, whose batches are checked, and what it reads.

    Raises:
        UserError: the data, the model or a key is wrong.
        Fault: the model is damaged, or the trainer's batches are not the chats.
    """
    from posttrain.training.lm_head import use_own_logits
    from posttrain.training.masks import counts, weights
    from posttrain.training.metrics import TrainingData
    from posttrain.training.sft_trainer import PackedRows, check_batches

    trainer, chats = open_trainer(config, context)
    check_batches(trainer, chats)
    use_own_logits(trainer, chats[0].ids, context)
    tokens = int(chats.lengths("ids").sum())
    with_loss = sum(part.report["loss_tokens"] for part in chats.parts) / sum(
        part.report["tokens"] for part in chats.parts
    )
    context.note(f"{len(chats)} chats, {tokens} tokens, {with_loss:.1%} of them with loss")
    data = TrainingData(
        counts,
        weights,
        rows=len(chats),
        tokens=tokens,
        sequence_length=trainer.args.max_length,
        digest=chats.digest,
        varying_shapes=not isinstance(trainer.data_collator, PackedRows),
        metrics={"packed_rows": len(trainer.train_dataset)},
    )
    return trainer, data


def open_trainer(config: Config, context: Context) -> "tuple[Trainer, Sequences[Conversation]]":
    """TRL's trainer with its data, and the chats that it was made from; used by the proof too."""
    from trl import SFTConfig

    from cordee.chat.tokenized import Tokenized
    from posttrain.training import reading, sequences, skeleton
    from posttrain.training.sft_trainer import PackedRows, TokenTrainer

    arguments = skeleton.arguments(SFTConfig, config, context)
    if not arguments.max_length:
        raise UserError("must be a number of tokens", key="trainer.max_length")
    model, tokenizer = skeleton.open_model(config)
    chats, heldout = reading.read(
        config, "chats", model, tokenizer, arguments.max_length, context, Tokenized.conversation
    )
    data, apart = (
        sequences.dataset(some, arguments.max_length, packing=arguments.packing) for some in (chats, heldout)
    )
    trainer = skeleton.open_trainer(
        TokenTrainer, config, model, arguments,
        train_dataset=data, eval_dataset=apart if len(apart) else None, processing_class=tokenizer,
    )  # fmt: skip
    if arguments.packing and "flash" not in model.config._attn_implementation:  # noqa: SLF001 - there is no public name
        trainer.data_collator = PackedRows(
            tokenizer.pad_token_id, config.per_device_train_batch_size, arguments.max_length
        )
    return trainer, chats


def run(config: Config, context: Context) -> dict[str, Any]:
    """Check, train or go on training, and write the model or the adapter; returns the manifest's metrics."""
    from posttrain.training.skeleton import fit

    return fit(build, config, context)


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
