"""The methods: how each makes its loss, and the figures beside it, of the log-probabilities of a batch."""

from typing import Any

import torch

from cordee import peek
from posttrain.losses import cpo as cpo_losses
from posttrain.losses import dpo as dpo_losses
from posttrain.losses import kto as kto_losses
from posttrain.losses import orpo as orpo_losses
from posttrain.losses import qrpo as qrpo_losses
from posttrain.losses import quantiles
from posttrain.losses.pairs import Pairs
from posttrain.losses.rewards import alphapo
from posttrain.training.scores import Figures, Objective, Scores, Side, mean

PAIR = ("chosen", "rejected")
LN2 = 0.6931471805599453


def names(module: str) -> list[str]:
    """The losses of a module of `posttrain.losses`."""
    return peek.functions(f"posttrain.losses.{module}")


def dpo(settings: Any) -> Objective:
    """Direct preference optimization with `trl.DPOConfig`'s settings."""
    kinds = [
        (getattr(dpo_losses, kind), weight)
        for kind, weight in zip(
            settings.loss_type, settings.loss_weights or [1.0] * len(settings.loss_type), strict=True
        )
    ]

    def loss(scores: Scores) -> tuple[torch.Tensor, Figures]:
        step = scores.step
        whole = None if step.sides is None else _pairs(step.sides, step.tokens_per_row)
        pairs = _pairs(scores.sides, step.tokens_per_row, whole, scores.at)
        total = sum(weight * kind(pairs, settings) for kind, weight in kinds)
        chosen, rejected = scores.sides
        rewards = settings.beta * chosen.ratio, settings.beta * rejected.ratio
        return total * chosen.certainty * rejected.certainty, _figures(*rewards, *scores.sides)

    starts_at = dict.fromkeys(("rewards/chosen", "rewards/rejected", "rewards/margins"), 0.0)
    if settings.loss_type == ["sigmoid"] and not settings.use_weighting and not settings.loss_weights:
        starts_at["loss"] = LN2
    return Objective(
        PAIR,
        loss,
        sorts=not dpo_losses.OF_RANKS.isdisjoint(settings.loss_type),
        weighs_certainty=settings.use_weighting,
        tail_weight=settings.ld_alpha,
        starts_at=starts_at,
        reward_scale=settings.beta,
    )


def kto(settings: Any) -> Objective:
    """Kahneman-Tversky optimization with `trl.KTOConfig`'s settings."""
    kind = getattr(kto_losses, settings.loss_type)

    def loss(scores: Scores) -> tuple[torch.Tensor, Figures]:
        (answer,), is_good = scores.sides, scores.columns["label"] > 0
        kl = scores.step.kl if scores.step.kl is not None else answer.logprobs.new_zeros(())
        figures = {"kl": mean(kl)} if scores.step.kl is not None else {}
        for name, which in (("chosen", is_good), ("rejected", ~is_good)):
            figures[f"rewards/{name}"] = mean(settings.beta * answer.ratio, which)
            figures[f"logps/{name}"] = mean(answer.logprobs, which)
        return kind(answer.ratio, is_good, kl, settings), figures

    has_kl = settings.loss_type in kto_losses.WITH_KL
    starts_at = dict.fromkeys(("rewards/chosen", "rewards/rejected", *(["kl"] if has_kl else [])), 0.0)
    return Objective(
        ("completion",), loss, columns=("label",), has_kl=has_kl, starts_at=starts_at, reward_scale=settings.beta
    )


def orpo(settings: Any) -> Objective:
    """Odds-ratio preference optimization with `trl.experimental.orpo.ORPOConfig`'s settings."""

    def loss(scores: Scores) -> tuple[torch.Tensor, Figures]:
        chosen, rejected = (side.logprobs / side.tokens for side in scores.sides)
        nll = scores.sides[0].nll / scores.step.tokens_per_row
        ratio = orpo_losses.log_odds_ratio(chosen, rejected)
        figures = _figures(settings.beta * chosen, settings.beta * rejected, *scores.sides)
        more = {
            "nll_loss": mean(nll),
            "log_odds_ratio": mean(torch.nn.functional.logsigmoid(ratio)),
            "log_odds_chosen": mean(ratio),
        }
        return orpo_losses.orpo(nll, ratio, settings.beta), figures | more

    return Objective(PAIR, loss, has_reference=False, has_prompt_loss=True)


def cpo(settings: Any) -> Objective:
    """Contrastive preference optimization with `trl.experimental.cpo.CPOConfig`'s settings."""
    kind = getattr(cpo_losses, settings.loss_type)

    def reward(side: Side) -> torch.Tensor:
        logprobs = side.logprobs / side.tokens if settings.loss_type in cpo_losses.OF_MEANS else side.logprobs
        return alphapo(logprobs, settings.alpha)

    def loss(scores: Scores) -> tuple[torch.Tensor, Figures]:
        chosen, rejected = map(reward, scores.sides)
        nll = scores.sides[0].nll / scores.step.tokens_per_row
        figures = _figures(settings.beta * chosen, settings.beta * rejected, *scores.sides)
        total = kind(chosen - rejected, settings)
        if settings.cpo_alpha:
            total = total + settings.cpo_alpha * nll
        return total, figures | {"nll_loss": mean(nll)}

    return Objective(PAIR, loss, has_reference=False)


def qrpo(beta: float, transform: str, *, length_normalization: bool, beta_max: float | None) -> Objective:
    """Quantile reward policy optimization with the keys of its stage."""
    transformed = getattr(quantiles, transform)

    def loss(scores: Scores) -> tuple[torch.Tensor, Figures]:
        (answer,) = scores.sides
        betas = qrpo_losses.betas(
            beta, answer.tokens, length_normalization=length_normalization, largest=beta_max
        ).double()
        quantile, references = qrpo_losses.quantiles(scores.columns["reward"], scores.columns["reference_rewards"])
        rewards, beta_log_z = transformed(quantile, references, betas)
        target, implied = rewards - beta_log_z, betas * answer.ratio
        figures = {
            "rewards": mean(implied),
            "targets": mean(target),
            "quantiles": mean(quantile),
            "betas": mean(betas),
            "logps": mean(answer.logprobs),
            "kl_per_token": mean(answer.ratio / answer.tokens),
        }
        return qrpo_losses.qrpo(answer.ratio, rewards, beta_log_z, betas).float(), figures

    return Objective(
        ("completion",),
        loss,
        columns=("reward", "reference_rewards"),
        starts_at={"rewards": 0.0},
        reward_scale=beta if beta_max is None else min(beta, beta_max),
    )


def _pairs(
    sides: tuple[Side, ...], tokens_per_pair: torch.Tensor, step: Pairs | None = None, at: torch.Tensor | None = None
) -> Pairs:
    chosen, rejected = sides
    return Pairs(
        chosen.logprobs,
        rejected.logprobs,
        chosen.reference,
        rejected.reference,
        chosen.tokens,
        rejected.tokens,
        chosen.nll,
        tokens_per_pair,
        step,
        at,
    )


def _figures(chosen: torch.Tensor, rejected: torch.Tensor, *sides: Side) -> Figures:
    """What is measured of pairs, of the rewards of their sides, `[pairs]` each."""
    return {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/accuracies": mean(chosen > rejected),
        "rewards/margins": mean(chosen - rejected),
        **{f"logps/{name}": mean(side.logprobs) for name, side in zip(PAIR, sides, strict=True)},
    }
