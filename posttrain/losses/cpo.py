"""The losses of contrastive preference optimization, each under the name that TRL's `loss_type` has for it.

There is no reference model. Each function gives the loss of each pair, `[pairs]`, without the likelihood of the chosen
answers that `cpo_alpha` weighs. β is `beta`; Δ, `margin`, `[pairs]` in nats, is r_w - r_l, of the log-probabilities of
both answers, or of what `rewards.alphapo` makes of them; L(x) = -log sigmoid(x); ε is `label_smoothing`.
"""

from typing import TYPE_CHECKING

import torch

from posttrain.losses.pairs import smoothed

if TYPE_CHECKING:
    from trl.experimental.cpo import CPOConfig

OF_MEANS = {"ipo", "simpo"}
"""The losses whose log-probabilities are means over an answer's tokens, and not sums."""
SMOOTHED = {"sigmoid", "simpo"}
"""The losses that read `label_smoothing`."""


def sigmoid(margin: torch.Tensor, settings: "CPOConfig") -> torch.Tensor:
    """(1 - ε) L(βΔ) + ε L(-βΔ), Δ = r_w - r_l: Xu et al. 2024, arXiv 2401.08417, equation 3."""
    return smoothed(settings.beta * margin, settings.label_smoothing)


def hinge(margin: torch.Tensor, settings: "CPOConfig") -> torch.Tensor:
    """max(0, 1 - βΔ): SLiC, Zhao et al. 2023, arXiv 2305.10425."""
    return torch.relu(1 - settings.beta * margin)


def ipo(margin: torch.Tensor, settings: "CPOConfig") -> torch.Tensor:
    """(Δ - 1/(2β))²: Azar et al. 2023, arXiv 2310.12036, equation 17."""
    return (margin - 1 / (2 * settings.beta)) ** 2


def simpo(margin: torch.Tensor, settings: "CPOConfig") -> torch.Tensor:
    """L(βΔ - gamma), smoothed as `sigmoid`, gamma `simpo_gamma`: Meng et al. 2024, arXiv 2405.14734."""
    return smoothed(settings.beta * margin - settings.simpo_gamma, settings.label_smoothing)
