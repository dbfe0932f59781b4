"""Quantile reward policy optimization (Matrenok et al. 2025, arXiv 2507.08068): answers with a reward, each alone.

    accelerate launch -m posttrain.qrpo --config FILE [key=value …]

A row has its answer's `reward`, and in `reference_rewards` those of the reference model's own answers to its prompt, as
posttrain.score writes them; of a preference pair each side is a row. The reference is the model as it is when the
training begins.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from cordee import worker
from cordee.config import FunctionOf, Library
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.stage import Context
from posttrain.training.cost import preference_cost
from posttrain.training.settings import PREFERENCE_OWNED, TrlConfig

if TYPE_CHECKING:
    from transformers import Trainer

    from posttrain.training.metrics import TrainingData

QRPO_OWNED = {
    **PREFERENCE_OWNED,
    **dict.fromkeys(("loss_type", "loss_weights", "ld_alpha", "label_smoothing", "use_weighting", "discopop_tau"), ""),
    **dict.fromkeys(("f_divergence_type", "f_alpha_divergence_coef"), ""),
    "beta": "the stage's `beta`",
}
"""Besides: what belongs to the losses of DPO."""
VERSION = 2


class Config(TrlConfig):
    """What is aligned, with which answers, how."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is kept at the reference; above 0. With `length_normalization` it is divided by the
    tokens of each answer."""
    beta_max: float | None = Field(default=0.1, gt=0)
    """What no answer's beta exceeds, which bounds the gradients; null: any."""
    length_normalization: bool = False
    """Whether an answer's beta is `beta` divided by its number of tokens, as in the Apertus models (there: 5)."""
    transform: Annotated[str, FunctionOf("posttrain.losses.quantiles")] = "identity"
    """What is made of the reward's quantile among the reference's: itself, its logarithm, or a normal distribution's
    value."""
    trainer: Annotated[dict[str, Any], Library("trl.DPOConfig", owned=QRPO_OWNED)] = Field(default_factory=dict)
    """TRL's settings, as far as they are no loss's (`learning_rate`, `num_train_epochs`, `max_length` in tokens, …)."""

    @model_validator(mode="after")
    def _is_not_cut_for_all(self) -> Self:
        if not self.length_normalization and self.beta_max is not None and self.beta > self.beta_max:
            problem = f"{self.beta} would be cut to beta_max={self.beta_max} for every answer"
            raise UserError(problem, key="beta", hint="raise beta_max, or write `length_normalization: true`")
        return self


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """At most: each answer with its prompt, read by the model and by the reference."""
    return preference_cost(config, given, "scored", has_reference=True)


def build(config: Config, context: Context) -> "tuple[Trainer, TrainingData]":
    """The trainer, whose answers are those that were checked here, and what it reads.

    Raises:
        UserError: the data, the model or a key is wrong.
        Fault: the model is damaged, or the trainer's batches are not the rows.
    """
    from trl import DPOConfig

    from posttrain.training import checks, objectives, preference, skeleton

    settings = skeleton.arguments(DPOConfig, config, context)
    objective = objectives.qrpo(
        config.beta,
        config.transform,
        length_normalization=config.length_normalization,
        beta_max=config.beta_max,
    )
    return preference.build(config, context, settings, "scored", objective, checks.enough_references(config.transform))


def run(config: Config, context: Context) -> dict[str, Any]:
    """Check the answers, train or go on training, and write the adapter or the model; returns its metrics."""
    from posttrain.training.skeleton import fit

    return fit(build, config, context)


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
