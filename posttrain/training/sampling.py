"""Completions that a model in training samples: the same ones again when the training is resumed.

A token is the largest of logit / temperature + Gumbel noise, which draws it from the softmax. A row's noise comes from
a seed of its own, so that it depends on neither the rows beside it nor the state of torch's generators.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to logits, row by row."""

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        """Draw the noise of each row by its seed."""
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - the library's signature
        """`[rows, vocab]`, whose largest entry is the token that is drawn."""
        uniform = torch.stack(
            [torch.rand(scores.shape[-1], generator=own, dtype=torch.float64) for own in self._generators]
        )
        noise = -(-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()
        return scores.double() / self._temperature + noise.to(scores.device)


def complete(
    model: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int], stops: Sequence[int], pad: int, *,
    max_new_tokens: int, temperature: float,
) -> list[list[int]]:  # fmt: skip
    """What a model samples after each prompt, from its whole distribution.

    Args:
        model: in evaluation mode, unwrapped.
        prompts: token ids `[seq]` of each.
        seeds: of each.
        stops: ids that end a completion; the one that does stands at its end.
        pad: an id to fill rows with.
        max_new_tokens: tokens of the longest completion.
        temperature: what logits are divided by.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    model.generation_config = GenerationConfig()  # nothing of its maker's, such as a repetition penalty
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stops), pad_token_id=pad
            ),
            logits_processor=LogitsProcessorList([GumbelNoise(seeds, temperature)]),
        )
    found = []
    for row in output[:, longest:].tolist():
        end = next((at for at, token in enumerate(row, 1) if token in stops), len(row))
        found.append(row[:end])
    return found


def seed_of(seed: int, step: int, place: int) -> int:
    """The seed of a row of a step, below 2^63, by its place among all rows of the step."""
    (state,) = np.random.SeedSequence((seed, step, place)).generate_state(1, np.uint64)
    return int(state) >> 1
