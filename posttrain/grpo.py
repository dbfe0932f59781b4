"""Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300) with TRL: online RL on its own completions.

    accelerate launch -m posttrain.grpo --config FILE [key=value …]

In each step the model answers some prompts several times; what is better than the mean of its group becomes more
likely. vLLM samples the completions where it is installed, with the weights of the step.
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

    defaults: ClassVar[Mapping[str, float]] = {"num_generations": 8, "max_completion_length": 512, "beta": 0.0}
    tools: list[str] = Field(default_factory=list)
    """Functions that the model may call, as `package.module:function`, with type hints and a docstring as TRL wants
    them; the chat template has to know tools."""
    environment: str | None = None
    """A class, as `package.module:Class`, whose methods are tools and whose `reset` begins each completion; its
    `get_reward`, where it has one, is a reward too."""
    trainer: Annotated[dict[str, Any], Library("trl.GRPOConfig", owned=ROLLOUT_OWNED)] = Field(default_factory=dict)
    """TRL's own settings (`learning_rate`, `num_generations`, `max_completion_length`, `beta`, `loss_type`,
    `epsilon_high`, …)."""


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """At most: all completions with as many tokens as they may have."""
    return rollout_cost(config, given)


def build(config: Config, context: Context) -> "tuple[Rollouts, TrainingData]":
    """The trainer, with what samples for it, and what it reads.

    Raises:
        UserError: the data, the model, a reward or a key is wrong, or vLLM does not serve the model.
        Fault: the model is damaged, or vLLM does not start.
    """
    from trl import GRPOConfig

    from posttrain.rollouts.build import imported, open_run
    from posttrain.rollouts.trainer import GrpoTrainer

    if not config.rewards and config.environment is None:
        raise UserError("nothing says what a completion is worth", key="rewards", hint="name at least one function")
    given: dict[str, Any] = {}
    if config.tools:
        given["tools"] = [imported(name, f"tools.{at}") for at, name in enumerate(config.tools)]
    if config.environment is not None:
        given["environment_factory"] = imported(config.environment, "environment")
    return open_run(GrpoTrainer, GRPOConfig, config, context, **given)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Check the prompts, train or go on training, and write what was trained; returns the manifest's metrics."""
    from posttrain.rollouts import build as rollouts

    return rollouts.run(build, config, context)


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
