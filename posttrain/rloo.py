"""REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740) with TRL: online RL on completions of its own.

    accelerate launch -m posttrain.rloo --config FILE [key=value …]

In each step the model answers some prompts several times; the baseline of each answer is the mean reward of the others.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from cordee import worker
from cordee.config import Library
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.stage import Context
from posttrain.rollouts.settings import ROLLOUT_OWNED, RolloutConfig, rollout_cost

if TYPE_CHECKING:
    from posttrain.rollouts.trainer import Rollouts
    from posttrain.training.metrics import TrainingData

VERSION = 2


class Config(RolloutConfig):
    """What is trained, on which prompts, and what completions are worth."""

    defaults: ClassVar[Mapping[str, float]] = {"num_generations": 2, "max_completion_length": 512, "beta": 0.05}
    trainer: Annotated[dict[str, Any], Library("trl.RLOOConfig", owned=ROLLOUT_OWNED)] = Field(default_factory=dict)
    """TRL's own settings (`learning_rate`, `num_generations`, `max_completion_length`, `beta`, …)."""


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """At most: all completions with as many tokens as they may have."""
    return rollout_cost(config, given)


def build(config: Config, context: Context) -> "tuple[Rollouts, TrainingData]":
    """The trainer, with what samples for it, and what it reads.

    Raises:
        UserError: the data, the model, a reward or a key is wrong, or vLLM does not serve the model.
        Fault: the model is damaged, or vLLM does not start.
    """
    from trl import RLOOConfig

    from posttrain.rollouts.build import open_run
    from posttrain.rollouts.trainer import RlooTrainer

    if not config.rewards:
        raise UserError("nothing says what a completion is worth", key="rewards", hint="name at least one function")
    return open_run(RlooTrainer, RLOOConfig, config, context)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Check the prompts, train or go on training, and write what was trained; returns the manifest's metrics."""
    from posttrain.rollouts import build as rollouts

    return rollouts.run(build, config, context)


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
