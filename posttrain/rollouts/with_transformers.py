"""Completions sampled by transformers, from the model that is trained."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    Trainer,
)

from posttrain.rollouts.sampling import Drawing, Sampled


class Transformers:
    """Samples all completions of a call in one batch, each from random numbers of its own."""

    def __init__(self, trainer: Trainer, stops: Sequence[int], pad: int) -> None:
        """Sample from a trainer's model, up to one of these ids; `pad` fills the rows."""
        self.trainer, self.stops, self.pad = trainer, list(stops), pad

    def sync(self) -> None:
        """Nothing: it is the trainer's own model."""

    def close(self) -> None:
        """Nothing."""

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: Drawing) -> list[Sampled]:
        """Continue each prompt, in the precision that is trained in."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        longest = max(map(len, prompts))
        padded = torch.tensor([[self.pad] * (longest - len(ids)) + list(ids) for ids in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
        drawing = Draw(how, seeds, longest, mask)
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=how.max_tokens, eos_token_id=self.stops, pad_token_id=self.pad,
            disable_compile=True,
        )  # fmt: skip
        was_training, own = model.training, model.generation_config
        model.generation_config = GenerationConfig()  # nothing of the maker's, such as a repetition penalty
        model.eval()
        try:
            with torch.no_grad(), self.trainer.compute_loss_context_manager():
                output = model.generate(
                    input_ids=padded, attention_mask=mask, generation_config=settings,
                    logits_processor=LogitsProcessorList([drawing]),
                )  # fmt: skip
        finally:
            model.generation_config = own
            model.train(was_training)
        logprobs = torch.stack(drawing.logprobs, dim=1).tolist()  # [batch, new]
        return [
            self._cut(ids, values) for ids, values in zip(output[:, longest:].tolist(), logprobs, strict=True)
        ]  # fmt: skip

    def _cut(self, ids: list[int], logprobs: list[float]) -> Sampled:
        """A row up to its end token; what follows is padding."""
        end = next((at for at, token in enumerate(ids, 1) if token in self.stops), len(ids))
        return Sampled(ids[:end], logprobs[:end])


class Draw(LogitsProcessor):
    """Draws each row's next token: adds Gumbel noise to the scores, the largest of which greedy decoding then takes.

    Each row has a generator of its own, so what is drawn does not depend on the others.
    """

    def __init__(self, how: Drawing, seeds: Sequence[int], prompt: int, mask: torch.Tensor) -> None:
        """Draw rows whose prompts are padded to `prompt` tokens, which `mask` `[batch, prompt]` tells from padding."""
        self.how, self.prompt, self.mask = how, prompt, mask
        self.generators = [torch.Generator(mask.device).manual_seed(seed) for seed in seeds]
        self.logprobs: list[torch.Tensor] = []
        """`[batch]` of each token that was drawn, in the distribution that it was drawn from."""
        self.warpers = LogitsProcessorList(_warpers(how))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[batch, vocabulary]` of the next tokens, with noise."""
        scores = self._penalized(input_ids, scores.float())
        scores = self.warpers(input_ids, scores)
        noisy = scores
        if self.how.temperature:
            noise = torch.stack(
                [torch.empty_like(scores[0]).exponential_(generator=generator) for generator in self.generators]
            )
            noisy = scores - noise.log()  # argmax of log p - log Exp(1) is a draw from p
        drawn = noisy.argmax(-1, keepdim=True)
        self.logprobs.append(scores.log_softmax(-1).gather(-1, drawn)[:, 0])
        return noisy

    def _penalized(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores with a repetition penalty, as transformers and vLLM have it, that does not see the padding."""
        if self.how.repetition_penalty == 1.0:
            return scores
        new = torch.ones(len(input_ids), input_ids.shape[1] - self.prompt, dtype=torch.bool, device=scores.device)
        there = torch.cat([self.mask.bool(), new], dim=1)
        seen = torch.zeros_like(scores).scatter_add_(1, input_ids, there.to(scores.dtype)) > 0
        penalty = self.how.repetition_penalty
        return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _warpers(how: Drawing) -> list[Any]:
    """What reshapes the distribution, in vLLM's order."""
    found: list[Any] = []
    if how.temperature not in (0.0, 1.0):
        found.append(TemperatureLogitsWarper(how.temperature))
    if how.min_p:
        found.append(MinPLogitsWarper(how.min_p))
    if how.top_k:
        found.append(TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        found.append(TopPLogitsWarper(how.top_p))
    return found
