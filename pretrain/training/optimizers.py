"""Optimizers of pretraining, one function each, selected by the key `optimizer`.

The learning rate is 0 until the loop sets it, before each step. All state is tensors of each parameter, which resume
points save. Weight decay is decoupled from the gradient; only matrices decay (embeddings too), no norm, bias or scalar.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pretrain.training.settings import Settings


def adamw(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2), as torch has it."""
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(_groups(model, settings), lr=0.0, betas=betas, fused=True)


def ademamix(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137): AdamW with a second, slow mean of gradients."""
    betas = (settings.adam_beta1, settings.adam_beta2, settings.ademamix_beta3)
    warmup_steps = settings.max_steps if settings.ademamix_warmup_steps is None else settings.ademamix_warmup_steps
    return AdEMAMix(_groups(model, settings), betas=betas, alpha=settings.ademamix_alpha, warmup_steps=warmup_steps)


def _groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Parameters that decay and those that do not."""
    matrices = [weights for weights in model.parameters() if weights.ndim >= 2]
    others = [weights for weights in model.parameters() if weights.ndim < 2]
    return [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]


class AdEMAMix(torch.optim.Optimizer):
    """The paper's algorithm 1, with g the gradient of the weights w and t the step, from 1.

    m1 = b1 m1 + (1 - b1) g,  m2 = b3(t) m2 + (1 - b3(t)) g,  v = b2 v + (1 - b2) g^2
    w -= lr ((m1 / (1 - b1^t) + alpha(t) m2) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w)

    Over the first T steps alpha(t) = alpha t / T, and 1 / ln b3(t) goes in a line from 1 / ln b1 to 1 / ln b3, which
    makes the half-life of the slow mean grow in a line.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float, float], alpha: float, warmup_steps: int
    ) -> None:
        """State of each parameter: the means `exp_avg`, `exp_avg_slow` and `exp_avg_sq`, and the count `step`."""
        settings = {"betas": betas, "alpha": alpha, "warmup_steps": warmup_steps, "eps": 1e-8}
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take a step; `closure` belongs to torch's signature and is not called."""
        del closure
        for group in self.param_groups:
            trained = [weights for weights in group["params"] if weights.grad is not None]
            for weights in trained:
                if not self.state[weights]:
                    means = {name: torch.zeros_like(weights) for name in ("exp_avg", "exp_avg_slow", "exp_avg_sq")}
                    self.state[weights].update(means, step=torch.zeros(()))
            if trained:
                self._update(group, trained, int(self.state[trained[0]]["step"]) + 1)

    def _update(self, group: dict[str, Any], trained: list[nn.Parameter], step: int) -> None:
        beta1, beta2, _ = group["betas"]
        beta3, alpha = self._slow(group, step)
        for weights in trained:
            state, gradient = self.state[weights], weights.grad
            state["step"] += 1
            state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
            state["exp_avg_slow"].mul_(beta3).add_(gradient, alpha=1 - beta3)
            state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            mean = state["exp_avg"] / (1 - beta1**step) + alpha * state["exp_avg_slow"]
            scale = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
            weights.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(mean, scale, value=-group["lr"])

    @staticmethod
    def _slow(group: dict[str, Any], step: int) -> tuple[float, float]:
        """Decay and weight of the slow mean in a step: b3(t) and alpha(t)."""
        beta1, _, beta3 = group["betas"]
        if step >= group["warmup_steps"]:
            return beta3, group["alpha"]
        done = step / group["warmup_steps"]
        inverse = (1 - done) / (math.log(beta1) if beta1 else -math.inf) + done / math.log(beta3)
        return math.exp(1 / inverse), done * group["alpha"]
