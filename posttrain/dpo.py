"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290) of a LoRA adapter or all weights.

    accelerate launch -m posttrain.dpo --config FILE [key=value …]

The reference is the model as it is when the training begins; what it says of the answers is computed once, before the
first step, so that no second model is in memory.
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

VERSION = 7


class Config(TrlConfig):
    """What is aligned, with which pairs, how."""

    trainer: Annotated[dict[str, Any], Library("trl.DPOConfig", owned=PREFERENCE_OWNED)] = Field(default_factory=dict)
    """TRL's own settings (`learning_rate`, `beta`, `loss_type`, `num_train_epochs`, `max_length` in tokens, …)."""


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """At most: each pair is two sequences of at most `max_length` tokens, read by the model and by the reference."""
    return preference_cost(config, given, "pairs", has_reference=True)


def build(config: Config, context: Context) -> "tuple[Trainer, TrainingData]":
    """The trainer, whose pairs are those that were checked here, and what it reads.

    Raises:
        UserError: the data, the model or a key is wrong.
        Fault: the model is damaged, or the trainer's batches are not the rows.
    """
    from trl import DPOConfig

    from posttrain.training import checks, objectives, preference, skeleton

    settings = skeleton.arguments(DPOConfig, config, context)
    checks.dpo(settings, config.trainer)
    return preference.build(config, context, settings, "pairs", objectives.dpo(settings))


def run(config: Config, context: Context) -> dict[str, Any]:
    """Check the pairs, train or go on training, and write the adapter or the model; returns the manifest's metrics."""
    from posttrain.training.skeleton import fit

    return fit(build, config, context)


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
