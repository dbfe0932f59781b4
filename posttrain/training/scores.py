"""What a preference loss is computed from, and what it gives: the policy's log-probabilities of a batch's answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Figures = dict[str, torch.Tensor]
"""By name: `[2]`, a sum and the number of what it is over, of which a step's or a held-out set's mean is made."""


@dataclass(frozen=True)
class Side:
    """One answer of each row: `[rows]` each."""

    logprobs: torch.Tensor
    """Log-probabilities under the policy, nats, summed over the answer's tokens; `ld_alpha` may weigh those."""
    reference: torch.Tensor
    """The same under the reference model; 0 of a method that has none."""
    tokens: torch.Tensor
    """How many tokens the answer has."""
    nll: torch.Tensor
    """The negative log-likelihood, nats, of all tokens with a label: the answer's, in some methods the prompt's."""
    certainty: torch.Tensor
    """The weight of the answer by the policy's own probability of it; 1 where it is not asked for."""

    @property
    def ratio(self) -> torch.Tensor:
        """`[rows]`: log π(y|x) - log π_ref(y|x)."""
        return self.logprobs - self.reference

    def fields(self) -> tuple[torch.Tensor, ...]:
        """All of them, in their order."""
        return self.logprobs, self.reference, self.tokens, self.nll, self.certainty


@dataclass(frozen=True)
class Step:
    """What a loss has to know of the whole step, or of the whole held-out set, beyond the rows of a batch."""

    tokens_per_row: torch.Tensor
    """Scalar: tokens with a label on the first side, divided by the rows."""
    sides: tuple[Side, ...] | None = None
    """Those of all rows, without gradients, where the loss depends on their order."""
    kl: torch.Tensor | None = None
    """Scalar, nats, at least 0: the mean of log π - log π_ref over answers to other prompts, where the loss measures
    it."""


@dataclass(frozen=True)
class Scores:
    """The policy's log-probabilities of the rows of a batch, and what the rows say."""

    sides: tuple[Side, ...]
    """Chosen and rejected, or the one answer."""
    columns: Mapping[str, torch.Tensor]
    """`[rows]` or `[rows, …]`: the batch's columns."""
    step: Step
    at: torch.Tensor
    """`[rows]`: where the rows stand in the step."""


Loss = Callable[[Scores], tuple[torch.Tensor, Figures]]
"""Gives the loss of each row, `[rows]`, and figures."""


@dataclass(frozen=True)
class Objective:
    """A method: what its rows are, what it needs, and its loss."""

    sides: tuple[str, ...]
    """The lists of token ids that follow the prompt: `chosen` and `rejected`, or `completion`."""
    loss: Loss
    columns: tuple[str, ...] = ()
    """Columns of the rows that the loss reads."""
    has_reference: bool = True
    has_prompt_loss: bool = False
    """Whether the first side's prompt has labels too."""
    sorts: bool = False
    """Whether the loss depends on the order of all values of a step."""
    has_kl: bool = False
    """Whether the divergence from the reference is measured, on answers to other prompts."""
    weighs_certainty: bool = False
    tail_weight: float | None = None
    """`ld_alpha`."""
    starts_at: Mapping[str, float] = field(default_factory=dict)
    """What figures have to be before the first update, where the policy is the reference."""
    reward_scale: float = 1.0
    """β: how a difference of log-probabilities shows in those figures."""


def mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """`[2]`: a figure that is the mean of values, without gradients; NaN counts only where it has weight.

    Args:
        values: of any shape.
        weights: of the same shape; 1 each by default.
    """
    values = values.detach().double()
    weights = torch.ones_like(values) if weights is None else weights.double()
    return torch.stack([(values * weights).sum(), weights.sum()])
