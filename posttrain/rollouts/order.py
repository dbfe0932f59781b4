"""In which order prompts are asked: each once a completion, and all again for each micro-batch, as TRL has it."""

import math
from collections.abc import Iterator

from torch.utils.data import Sampler
from transformers import Trainer

from cordee.stage import Context
from posttrain.rollouts.settings import RolloutConfig
from posttrain.training.order import Order
from posttrain.training.settings import TrlConfig


class PromptOrder(Sampler[int]):
    """Places of prompts: those of one rollout after the other, as TRL's dataloader cuts them.

    A rollout takes the next prompts of `Order`, across the end of an epoch, so that each is whole; TRL would leave out
    the prompts at the end of an epoch that fill no rollout.
    """

    def __init__(self, order: Order, prompts: int, completions: int, repeats: int) -> None:
        """Ask `prompts` prompts at once, for so many completions each; each rollout is loaded `repeats` times."""
        self.order, self.prompts, self.completions, self.repeats = order, prompts, completions, repeats

    def __len__(self) -> int:
        """How many places there are."""
        return len(self.order) * self.completions * self.repeats

    def __iter__(self) -> Iterator[int]:
        """The places; the same ones each time."""
        coming = list(self.order)
        for start in range(0, len(coming), self.prompts):
            one = [place for place in coming[start : start + self.prompts] for _ in range(self.completions)]
            for _ in range(self.repeats):
                yield from one


def set_order(trainer: Trainer, config: TrlConfig, context: Context) -> None:
    """Have whole rollouts sampled, in an order that the seed decides, or the data's own if asked for."""
    if not isinstance(config, RolloutConfig):
        raise TypeError("the stage is none that samples")
    settings, rows = trainer.args, len(trainer.train_dataset)
    at_once = config.generation_batch_size // config.num_generations
    if settings.max_steps <= 0:
        rollouts = math.ceil(round(rows * settings.num_train_epochs / at_once, 6))
        settings.max_steps = rollouts * config.steps_per_rollout
    rollouts = math.ceil(settings.max_steps / config.steps_per_rollout)
    if rows < at_once:
        context.note(f"a rollout takes {at_once} prompts of {rows}: it has some more than once")
    repeats = settings.steps_per_generation * config.num_iterations
    order = Order(rows, rollouts * at_once, context.seed, is_shuffled=settings.shuffle_dataset)
    whole = PromptOrder(order, at_once, config.num_generations, repeats)
    trainer._get_train_sampler = lambda _dataset=None: whole  # noqa: SLF001 - the only handle


def prompt_epochs(config: RolloutConfig, rows: int) -> float:
    """Rows of all steps of one epoch over so many prompts."""
    return float(rows * config.num_generations * config.num_iterations)
