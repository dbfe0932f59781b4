"""Trains a reward model on preference pairs with TRL (Bradley and Terry 1952): of a LoRA adapter or all weights.

    accelerate launch -m posttrain.reward --config FILE [key=value …]

What is published is a whole model that `AutoModelForSequenceClassification` opens; an adapter is merged into it. Pairs
that are held out tell its accuracy, and whether it knows how sure it can be (`calibration.json`).
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from cordee import files, worker
from cordee.config import Library
from cordee.cost import Cost
from cordee.stage import Context
from posttrain.training.cost import data_cost, training_cost
from posttrain.training.settings import OWNED, TrlConfig

if TYPE_CHECKING:
    from transformers import Trainer

    from posttrain.training.metrics import TrainingData

VERSION = 2
REWARD_OWNED = OWNED | dict.fromkeys(("dataset_num_proc", "label_smoothing_factor"), "")


class Config(TrlConfig):
    """What a reward model is made of, from which pairs, how."""

    trainer: Annotated[dict[str, Any], Library("trl.RewardConfig", owned=REWARD_OWNED)] = Field(default_factory=dict)
    """TRL's own settings (`learning_rate`, `center_rewards_coefficient`, `num_train_epochs`, `max_length` in tokens,
    …)."""


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """At most: each pair is two sequences of at most `max_length` tokens."""
    seen = data_cost(config, given, "pairs")
    in_pair = seen.tokens / seen.rows if seen.rows and seen.tokens else config.longest  # more than in either sequence
    tokens = 2.0 * seen.rows * min(in_pair, config.longest) if seen.rows else None
    return training_cost(config, given, tokens, sequences=2)


def build(config: Config, context: Context) -> "tuple[Trainer, TrainingData]":
    """The trainer, whose pairs are those that were checked here, and what it reads.

    Raises:
        UserError: the data, the model or a key is wrong.
        Fault: the model is damaged, or the trainer's batches are not the pairs.
    """
    from trl import RewardConfig

    from cordee.chat.tokenized import Tokenized
    from posttrain.training import reading, reward_trainer, skeleton
    from posttrain.training.metrics import TrainingData, counted

    settings = skeleton.arguments(RewardConfig, config, context)
    reward_trainer.check_settings(settings, config)
    model, tokenizer = reward_trainer.open_model(config, context.seed)
    found, heldout = reading.read(config, "pairs", model, tokenizer, settings.max_length, context, Tokenized.pair)
    trainer = skeleton.open_trainer(
        reward_trainer.TokenRewardTrainer, config, model, settings, processing_class=tokenizer,
        train_dataset=reward_trainer.dataset(found),
        eval_dataset=reward_trainer.dataset(heldout) if len(heldout) else None,
    )  # fmt: skip
    reward_trainer.check_batches(trainer, found)
    if reward_trainer.reads_before_the_end(trainer):
        context.note("the end of an answer is the padding token too: the reward is read at the token before it")
    tokens = int(found.lengths("prompt", "prompt", "chosen", "rejected").sum())
    data = TrainingData(
        partial(counted, len(reward_trainer.SIDES)),
        reward_trainer.weights,
        len(found),
        tokens,
        tokens // (2 * len(found)),
        found.digest,
    )
    return trainer, data


def run(config: Config, context: Context) -> dict[str, Any]:
    """Check the pairs, train or go on training, and write the reward model; returns the manifest's metrics."""
    from posttrain.training import calibration, reward_trainer, skeleton

    metrics = skeleton.fit(build, config, context, reward_trainer.save)
    file = context.out / calibration.NAME
    told = files.read_json(file) if file.exists() else {}
    return metrics | {name: told[name] for name in ("expected_calibration_error",) if name in told}


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
