"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290) with TRL: of a LoRA adapter or all weights.

    accelerate launch -m posttrain.dpo --config FILE [key=value …]

With an adapter the reference is the model with the adapter off; without one it is the model as it was.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from cordee import worker
from cordee.config import Library
from cordee.cost import Cost
from cordee.stage import Context
from posttrain.training.settings import OWNED, TrlConfig, data_cost, training_cost

if TYPE_CHECKING:
    from transformers import Trainer

    from posttrain.training.metrics import TrainingData

VERSION = 5
DPO_OWNED = OWNED | dict.fromkeys(
    ("logging_first_step", "truncation_mode", "padding_free", "label_smoothing_factor"), ""
)


class Config(TrlConfig):
    """What is aligned, with which pairs, how."""

    trainer: Annotated[dict[str, Any], Library("trl.DPOConfig", owned=DPO_OWNED)] = Field(default_factory=dict)
    """TRL's own settings (`learning_rate`, `beta`, `loss_type`, `num_train_epochs`, `max_length` in tokens, …)."""


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """At most: each pair is two sequences of at most `max_length` tokens, read by the model and by the reference."""
    seen = data_cost(config, given, "pairs")
    in_pair = seen.tokens / seen.rows if seen.rows and seen.tokens else config.longest  # more than in either sequence
    tokens = 2.0 * seen.rows * min(in_pair, config.longest) if seen.rows else None
    return training_cost(config, given, tokens, has_reference=True, sequences=2)


def build(config: Config, context: Context) -> "tuple[Trainer, TrainingData]":
    """The trainer, whose pairs are those that were checked here, and what it reads."""
    from trl import DPOConfig

    from cordee.chat.tokenized import Tokenized
    from posttrain.training import dpo_trainer, lm_head, reading, skeleton
    from posttrain.training.metrics import TrainingData

    settings = skeleton.arguments(DPOConfig, config, context)
    dpo_trainer.check_settings(settings, config.lora)
    if by_batch := dpo_trainer.BY_BATCH.intersection(settings.loss_type):
        context.note(
            f"{', '.join(sorted(by_batch))}: TRL's loss depends on per_device_train_batch_size and the processes"
        )
    model, tokenizer = skeleton.open_model(config)
    found, heldout = reading.read(config, "pairs", model, tokenizer, settings.max_length, context, Tokenized.pair)
    resume = context.out / "resume"
    trainer = skeleton.open_trainer(
        dpo_trainer.TokenPairTrainer, config, model, settings, processing_class=tokenizer,
        train_dataset=dpo_trainer.dataset(found, settings, resume),
        eval_dataset=dpo_trainer.dataset(heldout, settings, resume) if len(heldout) else None,
    )  # fmt: skip
    dpo_trainer.check_batches(trainer, found)
    lm_head.use_own_logits(trainer, found[0].prompt + found[0].chosen, context)
    is_rounded = settings.bf16 and (settings.precompute_ref_log_probs or config.compile != "off")
    trainer.add_callback(dpo_trainer.StartsAtReference(settings, tolerance=0.05 if is_rounded else 1e-3))
    tokens = int(found.lengths("prompt", "prompt", "chosen", "rejected").sum())
    length = tokens // (2 * len(found))
    data = TrainingData(
        dpo_trainer.counts, dpo_trainer.weights, len(found), tokens, length, found.digest, has_reference=True
    )  # fmt: skip
    return trainer, data


def run(config: Config, context: Context) -> dict[str, Any]:
    """Check the pairs, train or go on training, and write the adapter or the model; returns the manifest's metrics."""
    from posttrain.training.skeleton import fit

    return fit(build, config, context)


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
