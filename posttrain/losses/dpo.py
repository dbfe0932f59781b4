"""The losses of direct preference optimization, each under the name that TRL's `loss_type` has for it.

Each function gives the loss of each pair, `[pairs]`, of which the mean over a step is trained on. β is `beta`; h_w and
h_l are log π(y|x) - log π_ref(y|x) of the chosen and the rejected answer, summed over its tokens (nats); sigmoid is the
logistic function, and L(x) = -log sigmoid(x); ε is `label_smoothing`. Where a loss depends on a difference alone,
s_w - s_l, `f_divergence_type` says what s is: h by default.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid

from posttrain.losses.pairs import Pairs, divergence, smoothed

if TYPE_CHECKING:
    from trl import DPOConfig

SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}
"""The losses that read `label_smoothing`."""
OF_DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
"""The losses that another `f_divergence_type` has a meaning for."""
OF_RANKS = {"aot", "aot_unpaired"}
"""The losses that sort the values of a whole step."""


def sigmoid(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """L(β(s_w - s_l)): Rafailov et al. 2023, arXiv 2305.18290, equation 7."""
    return -logsigmoid(settings.beta * _margin(pairs, settings))


def hinge(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """max(0, 1 - β(s_w - s_l)): SLiC, Zhao et al. 2023, arXiv 2305.10425, of normalized likelihoods."""
    return torch.relu(1 - settings.beta * _margin(pairs, settings))


def ipo(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """(s_w/|y_w| - s_l/|y_l| - 1/(2β))²: Azar et al. 2023, arXiv 2310.12036, equation 17, with means over tokens."""
    return (_margin_of_means(pairs, settings) - 1 / (2 * settings.beta)) ** 2


def sigmoid_norm(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """L(β(s_w/|y_w| - s_l/|y_l|)): length-normalized DPO, Lambert et al. 2024, arXiv 2411.15124."""
    return -logsigmoid(settings.beta * _margin_of_means(pairs, settings))


def exo_pair(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """KL(p_θ ‖ (1 - ε, ε)), p_θ = sigmoid(±β(s_w - s_l)): Ji et al. 2024, arXiv 2402.00856, equation 16."""
    logits, epsilon = settings.beta * _margin(pairs, settings), settings.label_smoothing
    won = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-epsilon))
    return won + torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(epsilon))


def nca_pair(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """L(βh_w) + ½ L(-βh_w) + ½ L(-βh_l): NCA of two answers, Chen et al. 2024, arXiv 2402.05369."""
    won, lost = settings.beta * pairs.chosen_ratio, settings.beta * pairs.rejected_ratio
    return -logsigmoid(won) - 0.5 * logsigmoid(-won) - 0.5 * logsigmoid(-lost)


def robust(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """((1 - ε) L(βΔ) - ε L(-βΔ))/(1 - 2ε), Δ = s_w - s_l: Chowdhury et al. 2024, arXiv 2403.00409."""
    logits, epsilon = settings.beta * _margin(pairs, settings), settings.label_smoothing
    return -((1 - epsilon) * logsigmoid(logits) - epsilon * logsigmoid(-logits)) / (1 - 2 * epsilon)


def bco_pair(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """L(βh_w) + L(-βh_l): Jung et al. 2024, arXiv 2404.04656, without its shift of the reward."""
    return -logsigmoid(settings.beta * pairs.chosen_ratio) - logsigmoid(-settings.beta * pairs.rejected_ratio)


def sppo_hard(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """(h_w - 1/(2β))² + (h_l + 1/(2β))²: Wu et al. 2024, arXiv 2405.00675, equation 4.7 with hard preferences."""
    target = 0.5 / settings.beta
    return (pairs.chosen_ratio - target) ** 2 + (pairs.rejected_ratio + target) ** 2


def aot(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """(1 - ε) L(βδ) + ε L(-βδ): AOT of paired data, Melnyk et al. 2024, arXiv 2406.05882.

    δ is the difference of a step's sorted log π(y_w) - log π(y_l) and of the reference's, sorted too.
    """
    step, at = pairs.whole()
    ranks = _ranks(step.chosen - step.rejected)[at]
    reference = (step.reference_chosen - step.reference_rejected).sort().values
    return smoothed(settings.beta * (pairs.chosen - pairs.rejected - reference[ranks]), settings.label_smoothing)


def aot_unpaired(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """(1 - ε) L(βδ) + ε L(-βδ): AOT of unpaired data, Melnyk et al. 2024, arXiv 2406.05882.

    δ is the difference of a step's sorted h_w and sorted h_l. That of a row is its chosen answer's; its rejected answer
    belongs to the δ of another row, and adds its gradient alone.
    """
    step, at = pairs.whole()
    chosen, rejected = step.chosen_ratio, step.rejected_ratio
    below = rejected.sort().values[_ranks(chosen)[at]]
    above = chosen.sort().values[_ranks(rejected)[at]]
    own = smoothed(settings.beta * (pairs.chosen_ratio - below), settings.label_smoothing)
    anothers = smoothed(settings.beta * (above - pairs.rejected_ratio), settings.label_smoothing)
    return own + anothers - anothers.detach()


def apo_zero(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """1 - sigmoid(βh_w) + sigmoid(βh_l): D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7."""
    return 1 - torch.sigmoid(settings.beta * pairs.chosen_ratio) + torch.sigmoid(settings.beta * pairs.rejected_ratio)


def apo_down(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """sigmoid(βh_w) + 1 - sigmoid(β(h_w - h_l)): D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8."""
    margin = pairs.chosen_ratio - pairs.rejected_ratio
    return torch.sigmoid(settings.beta * pairs.chosen_ratio) + 1 - torch.sigmoid(settings.beta * margin)


def discopop(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """(1 - m) L(l) + m exp(-l), l = β(s_w - s_l), m = sigmoid(l/τ): Lu et al. 2024, arXiv 2406.08414, equation 5.

    τ is `discopop_tau`.
    """
    logits = settings.beta * _margin(pairs, settings)
    mixed = torch.sigmoid(logits / settings.discopop_tau)
    return -logsigmoid(logits) * (1 - mixed) + torch.exp(-logits) * mixed


def sft(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:  # noqa: ARG001 - as all losses
    """The negative log-likelihood of the chosen answer, so that the mean over a step is one over its tokens."""
    return pairs.chosen_nll / pairs.tokens_per_pair


def _margin(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """s_w - s_l."""
    return divergence(pairs.chosen_ratio, settings) - divergence(pairs.rejected_ratio, settings)


def _margin_of_means(pairs: Pairs, settings: "DPOConfig") -> torch.Tensor:
    """s_w/|y_w| - s_l/|y_l|."""
    chosen = divergence(pairs.chosen_ratio, settings) / pairs.chosen_tokens.clamp(min=1)
    return chosen - divergence(pairs.rejected_ratio, settings) / pairs.rejected_tokens.clamp(min=1)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """`[rows]`: the place of each value among the sorted ones."""
    order = values.argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
