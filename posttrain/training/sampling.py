"""Completions that a model in training samples by transformers: the same ones again when the training is resumed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cordee.chat import spans
from cordee.compute import adapter


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn; as TRL's config has it."""

    temperature: float
    """0 is greedy."""
    max_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Sampled:
    """What followed a prompt."""

    ids: list[int]
    """`[seq]`: all that were sampled, with the one that ended it."""
    logprobs: list[float]
    """`[seq]`, nats: of each, in the distribution that it was drawn from."""


def stops(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion of the model in a folder, that of the chat template among them."""
    end = spans.end_of_turn(tokenizer) if tokenizer.chat_template else None
    return list(dict.fromkeys([*adapter.stop_token_ids(folder), *([] if end is None else [end])]))


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    stops: Sequence[int],
    pad: int,
    how: SamplingSettings,
) -> list[Sampled]:
    """Continue each prompt, all in one batch, in evaluation mode.

    Args:
        model: unwrapped; it is left in the mode and with the generation config that it has.
        prompts: token ids `[seq]` of each.
        seeds: of each.
        stops: ids that end a completion; the one that does stands at its end.
        pad: an id to fill rows with.
        how: how tokens are drawn.
    """
    longest = max(map(len, prompts))
    padded = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    drawing = SeededSampling(how, seeds, longest, mask)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=how.max_tokens, eos_token_id=list(stops), pad_token_id=pad, disable_compile=True
    )
    was_training, own = model.training, model.generation_config
    model.generation_config = GenerationConfig()  # nothing of the maker's, such as a repetition penalty
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            output = model.generate(
                input_ids=padded, attention_mask=mask, generation_config=settings,
                logits_processor=LogitsProcessorList([drawing]),
            )  # fmt: skip
    finally:
        model.generation_config = own
        model.train(was_training)
    logprobs = torch.stack(drawing.logprobs, dim=1).tolist()  # [batch, new]
    return [_cut(ids, values, stops) for ids, values in zip(output[:, longest:].tolist(), logprobs, strict=True)]


def _cut(ids: list[int], logprobs: list[float], stops: Sequence[int]) -> Sampled:
    """A row up to its end token; what follows is padding."""
    end = next((at for at, token in enumerate(ids, 1) if token in stops), len(ids))
    return Sampled(ids[:end], logprobs[:end])


class SeededSampling(LogitsProcessor):
    """Draws each row's next token: adds Gumbel noise to the scores, the largest of which greedy decoding then takes.

    Each row has a generator of its own, so what is drawn does not depend on the others.
    """

    def __init__(self, how: SamplingSettings, seeds: Sequence[int], prompt: int, mask: torch.Tensor) -> None:
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


def _warpers(how: SamplingSettings) -> list[Any]:
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
