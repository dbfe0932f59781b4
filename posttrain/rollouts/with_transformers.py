"""Completions sampled by transformers, from the model that is trained."""

from collections.abc import Sequence

from transformers import Trainer

from posttrain.training import sampling
from posttrain.training.sampling import Sampled, SamplingSettings


class Transformers:
    """Samples all completions of a call in one batch, each from random numbers of its own."""

    def __init__(self, trainer: Trainer, stops: Sequence[int], pad: int) -> None:
        """Sample from a trainer's model, up to one of these ids; `pad` fills the rows."""
        self.trainer, self.stops, self.pad = trainer, list(stops), pad

    def sync(self) -> None:
        """Nothing: it is the trainer's own model."""

    def close(self) -> None:
        """Nothing."""

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: SamplingSettings) -> list[Sampled]:
        """Continue each prompt, in the precision that is trained in."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with self.trainer.compute_loss_context_manager():
            return sampling.sample(model, prompts, seeds, self.stops, self.pad, how)
