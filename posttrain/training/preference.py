"""What the stages that learn from given answers have in common: how their trainer is built and checked."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from transformers import Trainer

from cordee.chat.source import Of
from cordee.chat.tokenized import Tokenized
from cordee.compute.model import sequence_limits
from cordee.errors import Fault, UserError
from cordee.stage import Context
from posttrain.training import adapter_settings, lm_head, reading, reference, shared_prompt, skeleton
from posttrain.training.metrics import TrainingData, counted
from posttrain.training.order import set_order
from posttrain.training.preference_rows import PreferenceRows
from posttrain.training.preference_trainer import PreferenceTrainer
from posttrain.training.scores import Objective
from posttrain.training.sequences import Sequences
from posttrain.training.settings import CHECKED_BATCHES, TrlConfig
from posttrain.training.starts_at_reference import StartsAtReference

ROUNDING = 0.01
"""Nats a token by which bfloat16, or another engine, may differ from the policy's own log-probability."""


def check_settings(settings: Any, config: TrlConfig) -> None:
    """Refuse settings that no method can honour.

    Raises:
        UserError: there is one.
    """
    adapter_settings.require_dropout(config.lora, is_disabled=settings.disable_dropout)
    strategy = str(getattr(settings.train_sampling_strategy, "value", settings.train_sampling_strategy))
    if strategy not in ("random", "sequential"):
        problem = f"{strategy!r} is not known here: the rows of a step are sorted by length as it is"
        raise UserError(problem, key="trainer.train_sampling_strategy", hint="leave it out, or write sequential")
    if hasattr(settings, "beta") and not settings.beta > 0:
        raise UserError(f"must be above 0, not {settings.beta}", key="trainer.beta")


def build(
    config: TrlConfig,
    context: Context,
    settings: Any,
    of: Of,
    objective: Objective,
    check: Callable[[Sequences[Any]], None] | None = None,
) -> tuple[Trainer, TrainingData]:
    """The trainer, whose rows are those that were checked here, and what it reads.

    Args:
        config: the stage's config.
        context: where to write and to report.
        settings: what `skeleton.arguments` returned.
        of: what the rows are.
        objective: the method.
        check: sees that rows have what the method learns from.

    Raises:
        UserError: the data, the model or a key is wrong.
        Fault: the model is damaged, or the trainer's batches are not the rows.
    """
    check_settings(settings, config)
    model, tokenizer = skeleton.open_model(config)
    one = Tokenized.pair if of == "pairs" else Tokenized.answer
    found, heldout = reading.read(config, of, model, tokenizer, settings.max_length, context, one)
    if check is not None:
        check(found)
    longest = sequence_limits(model, settings.max_length).longest
    rows = PreferenceRows(found, objective, longest, "data")
    apart = PreferenceRows(heldout, objective, longest, "heldout")
    trainer = skeleton.open_trainer(
        PreferenceTrainer, config, model, settings, processing_class=tokenizer, train_dataset=rows,
        eval_dataset=apart if len(apart) else None, objective=objective,
    )  # fmt: skip
    lm_head.use_own_logits(trainer, [int(token) for ids in rows.tokens(0, 0) for token in ids], context)

    def begin() -> None:
        shared_prompt.use_where_exact(trainer, rows, context)
        check_batches(trainer, rows)
        if objective.has_reference:
            _use_reference(trainer, config, context, [rows, apart])

    if trainer.is_fsdp_enabled:  # before its training a model that will be sharded is not on the trainer's device
        trainer.before_training = begin
    else:
        begin()
    sides = objective.sides
    tokens = int(found.lengths(*["prompt"] * len(sides), *sides).sum())
    data = TrainingData(
        functools.partial(counted, len(sides)), None, len(found), tokens, tokens // (len(sides) * len(found)),
        found.digest, has_reference=objective.has_reference, has_kl=objective.has_kl,
        order=functools.partial(set_order, lengths=rows.lengths),
    )  # fmt: skip
    return trainer, data


def _use_reference(
    trainer: PreferenceTrainer, config: TrlConfig, context: Context, parts: Sequence[PreferenceRows]
) -> None:
    """Have the reference's log-probabilities computed, and the training start at them."""
    from_data = [reference.fill(trainer, rows, config, context) for rows in parts if len(rows)]
    is_rounded = trainer.args.bf16 or trainer.args.fp16 or any(from_data)
    trainer.add_callback(StartsAtReference(_expected(trainer, is_rounded=is_rounded)))


def _expected(trainer: PreferenceTrainer, *, is_rounded: bool) -> dict[str, tuple[float, float]]:
    """What figures have to be before the first update, and by how much they may be off.

    `is_rounded`: whether bfloat16 rounds other batches otherwise, or another engine has computed the reference.
    """
    objective, sequences = trainer.objective, trainer.train_dataset.sequences
    tokens = float(max(sequences.lengths(side).mean() for side in objective.sides))
    nats = max(0.5, ROUNDING * tokens) if is_rounded else 0.01
    tolerance = max(1e-3, nats * objective.reward_scale)
    return {name: (value, nats if name == "kl" else tolerance) for name, value in objective.starts_at.items()}


def check_batches(trainer: PreferenceTrainer, rows: PreferenceRows) -> None:
    """Look at what the trainer's own collator makes before anything is learnt from it.

    Raises:
        Fault: a batch holds other tokens than the rows, or compares others than the answers'.
    """
    size, data, sides = trainer.args.per_device_train_batch_size, trainer.train_dataset, rows.objective.sides
    if len(data) != len(rows.sequences):
        raise Fault(f"the trainer holds {len(data)} of {len(rows.sequences)} rows")
    for first in range(0, min(len(data), size * CHECKED_BATCHES), size):
        some: list[Any] = [rows.sequences[at] for at in range(first, min(first + size, len(data)))]
        batch = trainer.data_collator([data[at] for at in range(first, first + len(some))])
        answers = [(one, getattr(one, side)) for side in sides for one in some]
        for row, (one, answer) in enumerate(answers):
            kept, mask = batch["attention_mask"][row].bool(), batch["completion_mask"][row]
            expected = one.prompt + answer, [0] * len(one.prompt) + [1] * len(answer)
            labelled = batch["labels"][row][mask.bool()].tolist()
            found = batch["input_ids"][row][kept].tolist(), mask[kept].tolist()
            if found != expected or labelled != answer or mask[~kept].any():
                raise Fault("the trainer's batches are not the rows", file=one.file, key=f"row {one.number}")
        if "joint_at" in batch and not shared_prompt.is_same(batch):
            raise Fault("the joint sequences of the trainer's batches are not the separate ones")
