"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306): answers that are good or bad, each alone.

    accelerate launch -m posttrain.kto --config FILE [key=value …]

A row says with `label` whether its answer is good; of a preference pair the chosen one is, and the rejected one is not.
The reference is the model as it is when the training begins.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from cordee import worker
from cordee.config import Library
from cordee.cost import Cost
from cordee.stage import Context
from posttrain.training.cost import preference_cost
from posttrain.training.settings import PREFERENCE_OWNED, TrlConfig

if TYPE_CHECKING:
    from transformers import Trainer

    from posttrain.training.metrics import TrainingData

VERSION = 2


class Config(TrlConfig):
    """What is aligned, with which answers, how."""

    trainer: Annotated[dict[str, Any], Library("trl.KTOConfig", owned=PREFERENCE_OWNED)] = Field(default_factory=dict)
    """TRL's own settings (`learning_rate`, `beta`, `desirable_weight`, `undesirable_weight`, …)."""


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """At most: each answer with its prompt, read by the model and the reference, and with another prompt by both."""
    return preference_cost(
        config, given, "labelled", has_reference=True, has_kl=config.trainer.get("loss_type", "kto") == "kto"
    )


def build(config: Config, context: Context) -> "tuple[Trainer, TrainingData]":
    """The trainer, whose answers are those that were checked here, and what it reads.

    Raises:
        UserError: the data, the model or a key is wrong.
        Fault: the model is damaged, or the trainer's batches are not the rows.
    """
    from trl import KTOConfig

    from posttrain.training import checks, objectives, preference, skeleton

    settings = skeleton.arguments(KTOConfig, config, context, {"train_sampling_strategy": "random"})
    checks.kto(settings)
    return preference.build(config, context, settings, "labelled", objectives.kto(settings), checks.both_labels)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Check the answers, train or go on training, and write the adapter or the model; returns its metrics."""
    from posttrain.training.skeleton import fit

    return fit(build, config, context)


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
