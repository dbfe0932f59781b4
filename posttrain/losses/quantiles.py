"""What quantile reward policy optimization makes of a quantile, each under the name that `transform` has for it.

Quantiles u of the reference model's own answers are uniform over (0, 1), whatever their rewards are. So for each
transform f the partition function Z = E exp(f(u)/β) is known: the integral over u. Each function gives f(u) and
β log Z, `[answers]` each, and takes

- `quantiles`, `[answers]`, from 0 to 1;
- `references`, `[answers]`: how many answers of the reference model each was estimated with;
- `beta`, `[answers]`, above 0.
"""

import math
from typing import TypeAlias

import torch

Calibrated: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def identity(
    quantiles: torch.Tensor,
    references: torch.Tensor,  # noqa: ARG001 - as all transforms
    beta: torch.Tensor,
) -> Calibrated:
    """f(u) = u, Z = β(exp(1/β) - 1); Matrenok et al. 2025, arXiv 2507.08068, whose code takes Z ≈ β exp(1/β).

    β log Z = β log β + 1 + β log(1 - exp(-1/β)) holds for every β, and overflows for none.
    """
    return quantiles, beta * torch.log(beta) + 1 + beta * torch.log(-torch.expm1(-1 / beta))


def log(quantiles: torch.Tensor, references: torch.Tensor, beta: torch.Tensor) -> Calibrated:
    """f(u) = log u, Z = β/(1 + β). An answer below all n references counts as one at 1/n."""
    return torch.log(torch.maximum(quantiles, 1 / references)), -beta * torch.log1p(1 / beta)


def normal_icdf(quantiles: torch.Tensor, references: torch.Tensor, beta: torch.Tensor) -> Calibrated:
    """f(u) = Φ⁻¹(u), Z = exp(1/(2β²)): rewards with a standard normal distribution. u is kept in [1/n, 1 - 1/n]."""
    least = 1 / references
    kept = torch.minimum(torch.maximum(quantiles, least), 1 - least)
    return math.sqrt(2) * torch.erfinv(2 * kept - 1), 1 / (2 * beta)
