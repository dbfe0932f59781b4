"""Settings that a method can't honour, and rows that don't have what it learns from."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cordee.errors import UserError, nearest
from posttrain.losses import cpo as cpo_losses
from posttrain.losses import dpo as dpo_losses
from posttrain.training.objectives import names
from posttrain.training.sequences import Sequences

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LEAST_REFERENCES = 3
"""From fewer, a normal distribution's value would be 0 whatever the reward is."""


def dpo(settings: Any, given: Mapping[str, Any]) -> None:
    """See that DPO's settings fit each other.

    Args:
        settings: `trl.DPOConfig`.
        given: those that the recipe has.

    Raises:
        UserError: they don't.
    """
    kinds = settings.loss_type
    for kind in kinds:
        _require_known(kind, names("dpo"))
    told = ", ".join(kinds)
    if given.get("label_smoothing") and not dpo_losses.SMOOTHED.intersection(kinds):
        hint = f"losses that do: {', '.join(sorted(dpo_losses.SMOOTHED))}"
        raise UserError(f"{told} does not read it", key="trainer.label_smoothing", hint=hint)
    _require_range("label_smoothing", settings.label_smoothing, 0, 0.5 if "robust" in kinds else 1)
    if "exo_pair" in kinds and not settings.label_smoothing:
        hint = "the paper recommends 1e-3"
        raise UserError("has to be above 0 with exo_pair", key="trainer.label_smoothing", hint=hint)
    if settings.use_weighting and (sorting := dpo_losses.OF_RANKS.intersection(kinds)):
        problem = f"does not apply to {min(sorting)}, which re-pairs the values of a step"
        raise UserError(problem, key="trainer.use_weighting", hint="leave it out")
    if settings.ld_alpha is not None and not 0 <= settings.ld_alpha <= 1:
        raise UserError(f"must be from 0 to 1, not {settings.ld_alpha}", key="trainer.ld_alpha")
    _require_used("discopop_tau", given, is_read="discopop" in kinds, by=told)
    if not settings.discopop_tau > 0:
        raise UserError(f"must be above 0, not {settings.discopop_tau}", key="trainer.discopop_tau")
    _divergence(settings, given)


def _divergence(settings: Any, given: Mapping[str, Any]) -> None:
    kind = settings.f_divergence_type
    if kind not in DIVERGENCES:
        raise UserError(f"unknown value {kind!r}", key="trainer.f_divergence_type", hint=nearest(kind, DIVERGENCES))
    if kind != "reverse_kl" and (others := set(settings.loss_type) - dpo_losses.OF_DIFFERENCES):
        problem = f"does not apply to {min(others)}, which is not a function of a reward difference"
        hint = f"losses that it applies to: {', '.join(sorted(dpo_losses.OF_DIFFERENCES))}"
        raise UserError(problem, key="trainer.f_divergence_type", hint=hint)
    _require_used("f_alpha_divergence_coef", given, is_read=kind == "alpha_divergence", by=f"f_divergence_type {kind}")


def kto(settings: Any) -> None:
    """See that KTO's settings fit each other.

    Raises:
        UserError: they don't.
    """
    _require_known(settings.loss_type, names("kto"))
    for name in ("desirable_weight", "undesirable_weight"):
        if not getattr(settings, name) > 0:
            raise UserError(f"must be above 0, not {getattr(settings, name)}", key=f"trainer.{name}")


def cpo(settings: Any, given: Mapping[str, Any]) -> None:
    """See that CPO's settings fit each other.

    Raises:
        UserError: they don't.
    """
    kind = settings.loss_type  # TRL's config makes `simpo` of `alphapo`
    _require_known(kind, [*names("cpo"), "alphapo"])
    _require_used("simpo_gamma", given, is_read=kind == "simpo", by=kind)
    if settings.label_smoothing and kind not in cpo_losses.SMOOTHED:
        hint = f"losses that do: {', '.join(sorted(cpo_losses.SMOOTHED))}"
        raise UserError(f"{kind} does not read it", key="trainer.label_smoothing", hint=hint)
    _require_range("label_smoothing", settings.label_smoothing, 0, 1)
    if settings.cpo_alpha < 0:
        raise UserError(f"must be at least 0, not {settings.cpo_alpha}", key="trainer.cpo_alpha")
    if given.get("loss_type") == "alphapo" and given.get("cpo_alpha"):
        raise UserError(
            "alphapo sets it to 0", key="trainer.cpo_alpha", hint="leave it out, or write `loss_type: simpo`"
        )


def both_labels(answers: Sequences[Any]) -> None:
    """See that answers of both kinds are there.

    Raises:
        UserError: they are all good, or all bad.
    """
    labels = answers.floats("label")
    if labels.min() == labels.max():
        what = "good: `label` is true" if labels[0] else "bad: `label` is false"
        hint = "posttrain.sft trains on good answers alone" if labels[0] else ""
        raise UserError(f"all {len(labels)} answers are {what}, and KTO learns from both kinds", key="data", hint=hint)


def enough_references(transform: str) -> Callable[[Sequences[Any]], None]:
    """What sees that a transform tells apart what the reference model's answers are worth."""

    def check(answers: Sequences[Any]) -> None:
        fewest = int(answers.lengths("reference_rewards").min())
        if transform == "normal_icdf" and fewest < LEAST_REFERENCES:
            problem = (
                f"normal_icdf needs {LEAST_REFERENCES} rewards of the reference model's answers, and a row has {fewest}"
            )
            raise UserError(problem, key="transform", hint="identity and log do with fewer")
        if np.ptp(answers.floats("reward")) == 0:
            raise UserError(f"all {len(answers)} answers have the same reward: there is nothing to learn", key="data")

    return check


def _require_known(kind: str, known: list[str]) -> None:
    if kind not in known:
        raise UserError(f"there is no loss {kind!r}", key="trainer.loss_type", hint=nearest(kind, known))


def _require_range(name: str, value: float, least: float, below: float) -> None:
    if not least <= value < below:
        raise UserError(f"must be from {least} to below {below}, not {value}", key=f"trainer.{name}")


def _require_used(name: str, given: Mapping[str, Any], *, is_read: bool, by: str) -> None:
    """Refuse a setting that a recipe has for nothing."""
    if name in given and not is_read:
        raise UserError(f"{by} does not read it", key=f"trainer.{name}", hint="leave it out")
