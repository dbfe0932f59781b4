"""The losses of single answers that are good or bad, each under the name that TRL's `loss_type` has for it.

Each function gives the loss of each answer, `[answers]`. β is `beta`; h is log π(y|x) - log π_ref(y|x), summed over the
answer's tokens (nats); λ is `desirable_weight` or `undesirable_weight`.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trl import KTOConfig

WITH_KL = {"kto"}
"""The losses that measure the KL divergence from the reference."""


def kto(ratio: torch.Tensor, is_good: torch.Tensor, kl: torch.Tensor, settings: "KTOConfig") -> torch.Tensor:
    """λ(1 - sigmoid(±β(h - z))), + where the answer is good: Ethayarajh et al. 2024, arXiv 2402.01306, equation 7.

    Args:
        ratio: `[answers]`: h.
        is_good: `[answers]`, bool.
        kl: scalar: z, the mean of h over answers to other prompts, at least 0, without gradient.
        settings: gives β and λ.
    """
    gain = settings.beta * torch.where(is_good, ratio - kl, kl - ratio)
    return _weights(is_good, settings) * (1 - torch.sigmoid(gain))


def apo_zero_unpaired(
    ratio: torch.Tensor,
    is_good: torch.Tensor,
    kl: torch.Tensor,  # noqa: ARG001 - as all losses
    settings: "KTOConfig",
) -> torch.Tensor:
    """λ(1 - sigmoid(±βh)), + where the answer is good: D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7."""
    gain = settings.beta * torch.where(is_good, ratio, -ratio)
    return _weights(is_good, settings) * (1 - torch.sigmoid(gain))


def _weights(is_good: torch.Tensor, settings: "KTOConfig") -> torch.Tensor:
    return torch.where(is_good, settings.desirable_weight, settings.undesirable_weight)
