"""How far the log-probabilities of sampled tokens are apart between what sampled them and the trainer.

Both are of the same weights, so what differs is rounding, or a fault: weights that were not renewed, another
temperature, another chat template. The trainer's are those of its own forward pass for the loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from cordee.errors import Fault


@dataclass
class Mismatch:
    """The differences since the last step, over all processes."""

    limit: float | None
    """Nats that they may be on average; None: they are measured alone."""
    advice: str
    """What to do where they are more."""
    total: float = 0.0
    kl: float = 0.0
    largest: float = 0.0
    tokens: float = 0.0

    def add(
        self, own: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor, accelerator: Accelerator
    ) -> dict[str, float]:
        """Compare a batch, and return the figures of the step so far.

        The divergence is Schulman's estimate `r - 1 - log r` of KL(sampler ‖ trainer), `r` = trainer's probability over
        the sampler's, whose draws the tokens are.

        Args:
            own: `[rows, length]`, nats: the trainer's.
            sampled: `[rows, length]`, nats: the sampler's.
            mask: `[rows, length]`: 1 for tokens that were sampled.
            accelerator: sums over the processes.

        Raises:
            Fault: they differ by more than the limit on average, or one is not finite.
        """
        kept = mask.bool()
        apart = (own - sampled)[kept].double()
        sums = torch.stack([apart.abs().sum(), (apart.exp() - 1 - apart).sum(), kept.sum().double()]).float()
        peak = apart.abs().max().float() if len(apart) else sums.new_zeros(())
        sums = accelerator.reduce(sums, "sum")
        total, kl, tokens = sums.tolist()
        self.total, self.kl, self.tokens = self.total + total, self.kl + kl, self.tokens + tokens
        self.largest = max(self.largest, float(accelerator.gather(peak[None]).max()))
        mean = self.total / max(self.tokens, 1.0)
        if not math.isfinite(mean):
            raise Fault("log-probabilities of sampled tokens are not finite")
        if self.limit is not None and mean > self.limit:
            raise Fault(
                f"log-probabilities of sampled tokens differ by {mean:.3g} nats on average (max {self.largest:.3g}) "
                f"between sampler and trainer; limit {self.limit}",
                key="max_logprob_mismatch",
                hint=self.advice,
            )
        return {
            "logprob_mismatch/mean": mean,
            "logprob_mismatch/max": self.largest,
            "logprob_mismatch/kl": self.kl / max(self.tokens, 1.0),
        }

    def clear(self) -> None:
        """Begin another step."""
        self.total = self.kl = self.largest = self.tokens = 0.0


def advice(engine: str, precision: str, reshapes: Sequence[str]) -> str:
    """What to do where they are too far apart."""
    said = ["engine: transformers samples from the model itself"] if engine == "vllm" else []
    said += ["float32 rounds less (precision, without trainer.bf16 or fp16)"] if precision != "float32" else []
    said += [f"{', '.join(reshapes)} draw from another distribution"] if reshapes else []
    return "; ".join([*said, "a larger limit allows it, with the importance sampling that TRL has"])


def importance_ratio(
    logprobs: torch.Tensor,
    sampled: torch.Tensor,
    mask: torch.Tensor,
    mode: str,
    bounds: tuple[float | None, float | None],
) -> torch.Tensor:
    """The trainer's probability of each sampled token, or sequence, over the sampler's, cut or masked outside bounds.

    Truncated importance sampling, as TRL has it (Yao et al. 2025): `min(π_train / π_sample, C)`.

    Args:
        logprobs: `[rows, length]`, nats: the trainer's, without gradient.
        sampled: `[rows, length]`, nats: the sampler's.
        mask: `[rows, length]`: 1 for tokens that were sampled.
        mode: `token_truncate`, `token_mask`, `sequence_truncate` or `sequence_mask`.
        bounds: the least and the largest ratio; None: no bound.

    Returns:
        `[rows, length]`, or `[rows, 1]` of sequences.
    """
    apart = torch.nan_to_num((logprobs - sampled) * mask, nan=0.0)
    ratio = (apart.sum(-1, keepdim=True) if mode.startswith("sequence") else apart).exp()
    least, largest = bounds
    if mode.endswith("truncate"):
        return ratio.clamp(min=least, max=largest)
    outside = (ratio < (-math.inf if least is None else least)) | (ratio > (math.inf if largest is None else largest))
    return ratio.masked_fill(outside, 0.0)
