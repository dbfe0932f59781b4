"""The loss of quantile reward policy optimization: Matrenok et al. 2025, arXiv 2507.08068."""

import torch


def qrpo(ratio: torch.Tensor, rewards: torch.Tensor, beta_log_z: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """(R - β log Z - β log(π/π_ref))², `[answers]`: least over all policies at π = π_ref exp(R/β)/Z.

    Args:
        ratio: `[answers]`: log π(y|x) - log π_ref(y|x), summed over the answer's tokens, nats.
        rewards: `[answers]`: R, transformed quantiles.
        beta_log_z: `[answers]`.
        beta: `[answers]`.
    """
    return (rewards - beta_log_z - beta * ratio) ** 2


def quantiles(rewards: torch.Tensor, reference_rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The share of reference rewards that are no larger than each reward, and how many there are: `[answers]` each.

    Args:
        rewards: `[answers]`.
        reference_rewards: `[answers, references]`, of the reference model's own answers to the same prompt; NaN fills
            rows that have fewer.
    """
    count = (~reference_rewards.isnan()).sum(1)
    return (reference_rewards <= rewards[:, None]).sum(1) / count, count


def betas(beta: float, tokens: torch.Tensor, *, length_normalization: bool, largest: float | None) -> torch.Tensor:
    """β of each answer, `[answers]`.

    With length normalization β is *divided* by the number of the answer's tokens, so that β log(π/π_ref) is `beta`
    times a mean over tokens; R keeps its size, and β log Z is that of the divided β: section 4.3 of the Apertus report.
    Its code also keeps every β at or below 0.1.

    Args:
        beta: the key.
        tokens: `[answers]`: of each answer.
        length_normalization: whether to divide.
        largest: what no β exceeds; None: any.
    """
    each = torch.full(tokens.shape, beta, dtype=torch.float32, device=tokens.device)
    if length_normalization:
        each = each / tokens
    return each if largest is None else each.clamp(max=largest)
