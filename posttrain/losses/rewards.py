"""Rewards that a policy's own log-probabilities imply."""

import torch


def alphapo(logprobs: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 - p^-a)/a, and log p at a = 0, with a `alpha`: AlphaPO, Gupta et al. 2025, arXiv 2501.03884.

    Args:
        logprobs: of any shape: log p, nats.
        alpha: the shape of the reward.
    """
    return logprobs if alpha == 0 else -torch.expm1(-alpha * logprobs) / alpha
