"""The loss of odds-ratio preference optimization."""

import torch
from torch.nn.functional import logsigmoid


def orpo(nll: torch.Tensor, log_odds_ratio: torch.Tensor, beta: float) -> torch.Tensor:
    """L_SFT - λ log sigmoid(log odds ratio), `[pairs]`: Hong et al. 2024, arXiv 2403.07691, equations 6 and 7.

    Args:
        nll: `[pairs]`: the negative log-likelihood of the prompt with the chosen answer, in a mean over the step's
            tokens.
        log_odds_ratio: `[pairs]`.
        beta: λ.
    """
    return nll - beta * logsigmoid(log_odds_ratio)


def log_odds_ratio(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """log(odds(y_w)/odds(y_l)), odds(y) = p/(1 - p), p the geometric mean of its tokens' probabilities: `[pairs]`.

    Hong et al. 2024, arXiv 2403.07691, equation 4.

    Args:
        chosen: `[pairs]`: mean log-probability of the chosen answers' tokens, nats.
        rejected: `[pairs]`: of the rejected ones'.
    """
    return (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))


def _log1mexp(value: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(value)), of values below 0; each branch where it loses no digits."""
    is_small = value < -0.6931471805599453
    # the branch that is not taken would have a gradient that is no number
    small, large = torch.where(is_small, value, -1.0), torch.where(is_small, -0.5, value)
    return torch.where(is_small, torch.log1p(-torch.exp(small)), torch.log(-torch.expm1(large)))
