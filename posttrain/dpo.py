"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290) with TRL: of a LoRA adapter or all weights.

    accelerate launch -m posttrain.dpo --config FILE [key=value …]

With an adapter the reference is the model with the adapter off; without one it is the model as it was.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from cordee import worker
from cordee.config import Config as Keys
from cordee.config import Input, Library
from cordee.cost import Cost
from cordee.stage import Context
from posttrain.settings import OWNED, TrlConfig, data_cost, training_cost

if TYPE_CHECKING:
    from transformers import Trainer

    from cordee.chat.pairs import TokenPair
    from posttrain.training import Meter

VERSION = 1
DPO_OWNED = OWNED | dict.fromkeys(("logging_first_step", "truncation_mode", "padding_free"), "")


class Source(Keys):
    """One file of preference pairs."""

    path: Input
    """A .parquet or .jsonl file with `prompt`, `chosen` and `rejected`, each a list of messages, and `tools` if any."""
    ignore: list[str] = Field(default_factory=list)
    """Columns and keys of messages that are left out, though they hold something that the chat template can't use."""


class Config(TrlConfig):
    """What is aligned, with which pairs, how."""

    data: list[Source] = Field(min_length=1)
    """The pairs to learn from; at least one file."""
    trainer: Annotated[dict[str, Any], Library("trl.DPOConfig", owned=DPO_OWNED)] = Field(default_factory=dict)
    """TRL's own settings (`learning_rate`, `beta`, `loss_type`, `num_train_epochs`, `max_length` in tokens, …)."""


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """At most: each pair is two sequences of at most `max_length` tokens, read by the model and by the reference."""
    columns = ["prompt", "chosen", "rejected"]
    data = [data_cost(source.path, f"data.{place}.path", given, columns) for place, source in enumerate(config.data)]
    pairs = sum(part.rows or 0.0 for part in data)
    steps = config.trainer.get("max_steps", 0)
    seen = steps * config.global_batch_size if steps > 0 else pairs * config.trainer.get("num_train_epochs", 3)
    longest = config.trainer.get("max_length") or 1024
    in_pair = sum(part.tokens or 0.0 for part in data) / pairs if pairs else 0.0  # more than in either sequence of it
    tokens = 2.0 * seen * (min(in_pair, longest) or longest) if seen else None
    return training_cost(config, given, tokens, has_reference=True)


def build(config: Config, context: Context) -> "tuple[Trainer, Meter]":
    """The trainer, whose pairs are those that were checked here, and what its batches count for."""
    from trl import DPOConfig

    from cordee.chat import pairs
    from cordee.chat.templates import Template
    from cordee.compute.model import sequence_limits
    from posttrain import dpo_trainer, training

    settings = training.arguments(DPOConfig, config, context, logging_first_step=True)
    dpo_trainer.check_settings(settings, config.lora)
    model, tokenizer = training.open_model(config)
    template, limits = Template(tokenizer), sequence_limits(model, settings.max_length)
    found: list[TokenPair] = []
    for source in config.data:
        found += pairs.tokenize(source.path, template, limits, context.note, source.ignore)
    data = dpo_trainer.dataset(found, settings, context.out)
    trainer = training.open_trainer(
        dpo_trainer.TokenPairTrainer, config, model, settings, train_dataset=data, processing_class=tokenizer
    )
    dpo_trainer.check_batches(trainer, found)
    is_rounded = settings.bf16 and (settings.precompute_ref_log_probs or config.compile != "off")
    trainer.add_callback(dpo_trainer.StartsAtReference(settings, tolerance=0.05 if is_rounded else 1e-3))
    tokens = sum(pair.tokens for pair in found)
    length = tokens // (2 * len(found))
    return trainer, training.Meter(dpo_trainer.counts, len(found), tokens, length, has_reference=True)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Check the pairs, train or go on training, and write the adapter or the model; returns the manifest's metrics."""
    from posttrain.training import fit

    return fit(build, config, context)


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
