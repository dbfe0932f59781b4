"""What losses of preference pairs are made of: log-probabilities of both answers, and how tokens and pairs weigh."""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from trl import DPOConfig

LARGEST_EXPONENT = 80.0
"""Its exponential is far below the largest float32."""


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of the two answers of each pair, nats, summed over their tokens: `[pairs]` each."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    chosen_nll: torch.Tensor
    """The negative log-likelihood of the chosen answer: `-chosen`, unless `ld_alpha` weighs its tokens."""
    tokens_per_pair: torch.Tensor | float
    """Tokens of chosen answers in the whole step, divided by its pairs."""
    step: "Pairs | None" = None
    """The pairs of the whole step, of which these are some, without gradients; None: these are all."""
    at: torch.Tensor | None = None
    """`[pairs]`, int64: their places in `step`."""

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """`[pairs]`: log π(y|x) - log π_ref(y|x) of the chosen answers."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """`[pairs]`: log π(y|x) - log π_ref(y|x) of the rejected answers."""
        return self.rejected - self.reference_rejected

    def whole(self) -> "tuple[Pairs, torch.Tensor]":
        """The whole step, and where these pairs stand in it, `[pairs]`."""
        if self.step is not None and self.at is not None:
            return self.step, self.at
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        detached = {name: value.detach() if torch.is_tensor(value) else value for name, value in values.items()}
        return Pairs(**detached), torch.arange(len(self.chosen), device=self.chosen.device)


def divergence(ratio: torch.Tensor, settings: "DPOConfig") -> torch.Tensor:
    """f'(t) of t = π/π_ref, from log t, up to a constant: Wang et al. 2023, arXiv 2309.16240.

    By `f_divergence_type`: log t, or 1 - 1/t, or log 2t/(1 + t), or (t^(a-1) - 1)/(a - 1) with a
    `f_alpha_divergence_coef`.
    """
    kind, power = settings.f_divergence_type, settings.f_alpha_divergence_coef - 1
    if kind == "forward_kl":
        return 1 - torch.exp(-ratio)
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(ratio)
    if kind == "alpha_divergence" and abs(power) >= 1e-6:  # at 1 it is the reverse KL
        return torch.expm1((power * ratio).clamp(max=LARGEST_EXPONENT)) / power
    return ratio


def smoothed(logits: torch.Tensor, epsilon: float) -> torch.Tensor:
    """(1 - ε) L(x) + ε L(-x), L(x) = -log sigmoid(x), of the shape of x: preferences of which a share ε is wrong.

    `epsilon` is `label_smoothing`.
    """
    return -logsigmoid(logits) * (1 - epsilon) - logsigmoid(-logits) * epsilon


def token_weights(is_answer: torch.Tensor, shared: torch.Tensor, alpha: float | None) -> torch.Tensor:
    """The weight of each token in an answer's log-probability: 1 up to the length that both sides of a pair have.

    LD-DPO: Liu et al. 2024, arXiv 2409.06411; `alpha` is `ld_alpha`.

    Args:
        is_answer: `[answers, seq]`, bool: which tokens are of the answer.
        shared: `[answers]`: tokens of the shorter side.
        alpha: the weight behind it; None: 1.

    Returns:
        `[answers, seq]`, 0 outside the answer.
    """
    if alpha is None:
        return is_answer.float()
    place = is_answer.long().cumsum(1)
    return torch.where(place <= shared[:, None], 1.0, alpha) * is_answer


def certainty(logprobs: torch.Tensor, log_squares: torch.Tensor, is_answer: torch.Tensor) -> torch.Tensor:
    """The weight of an answer by the policy's own probability of it; that of a pair is the product of its answers'.

    WPO: Zhou et al. 2024, arXiv 2406.11827, equation 2.

    Args:
        logprobs: `[answers, seq]`: of each token, nats.
        log_squares: `[answers, seq]`: log Σ p² over the vocabulary.
        is_answer: `[answers, seq]`, bool: which tokens are of the answer.

    Returns:
        `[answers]`, without gradients.
    """
    aligned = ((logprobs - log_squares).detach() * is_answer).sum(1)
    return torch.exp(aligned / is_answer.sum(1).clamp_min(1))
