"""Odds-ratio preference optimization (Hong et al. 2024, arXiv 2403.07691): fine-tuning and alignment at once.

    accelerate launch -m posttrain.orpo --config FILE [key=value …]

There is no reference model: the likelihood of the chosen answers is trained, and their odds against the rejected ones.
"""

import os
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
    """What is aligned, with which pairs, how."""

    trainer: Annotated[dict[str, Any], Library("trl.experimental.orpo.ORPOConfig", owned=PREFERENCE_OWNED)] = Field(
        default_factory=dict
    )
    """TRL's own settings (`learning_rate`, `beta`, which the paper calls λ, `max_length` in tokens, …)."""


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """At most: each pair is two sequences of at most `max_length` tokens."""
    return preference_cost(config, given, "pairs")


def build(config: Config, context: Context) -> "tuple[Trainer, TrainingData]":
    """The trainer, whose pairs are those that were checked here, and what it reads.

    Raises:
        UserError: the data, the model or a key is wrong.
        Fault: the model is damaged, or the trainer's batches are not the rows.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # of its config alone, whose fields are checked
    from trl.experimental.orpo import ORPOConfig

    from posttrain.training import objectives, preference, skeleton

    settings = skeleton.arguments(ORPOConfig, config, context)
    return preference.build(config, context, settings, "pairs", objectives.orpo(settings))


def run(config: Config, context: Context) -> dict[str, Any]:
    """Check the pairs, train or go on training, and write the adapter or the model; returns the manifest's metrics."""
    from posttrain.training.skeleton import fit

    return fit(build, config, context)


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
