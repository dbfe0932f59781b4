"""A model's log-probabilities on a short text, kept as `probe.json` beside its weights.

An engine that serves these weights gives the same log-probabilities, so it can be checked without opening the model a
second time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import softplus
from transformers import PreTrainedModel
from transformers.activations import XIELUActivation

from cordee import files, model_folder
from cordee.compute.logprobs import score
from cordee.errors import Fault

TEXT = "Article 1. All human beings are born free and equal in dignity and rights."
NAME = "probe.json"
PROBE_LIMIT = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Largest difference of a log-probability from the probe's, in nats, by the dtype that vLLM computes in."""
COMPILED_LIMIT = 0.05
"""The least limit where vLLM compiles, which rounds differently: xIELU's float32 differs by 0.013 nats."""
NEARER = 2
"""How many times nearer than the model's own, on average over the probe, another's log-probabilities may be.

Where two models differ by less than what is rounded, either may be a little nearer.
"""


@dataclass(frozen=True)
class Probe:
    """Token ids and what the model says of them."""

    ids: list[int]
    logprobs: torch.Tensor
    """`[len(ids) - 1]`, float32, in nats: of each token but the first, given those before it."""


def measure(model: PreTrainedModel, ids: Sequence[int]) -> Probe:
    """Score the token ids with a float32 model, as vLLM serves it; the model's xIELU slopes are rounded in place."""
    kept = list(ids)[: model_folder.shape(model.config.to_dict()).positions]
    (scores,) = score(as_served(model.eval()), [kept])
    return Probe(kept, scores.logprobs)


def write(folder: Path, probe: Probe) -> None:
    """Write `probe.json`."""
    files.write_json(folder / NAME, {"ids": probe.ids, "logprobs": probe.logprobs.tolist()})


def read(folder: Path) -> Probe:
    """Read `probe.json`.

    Raises:
        Fault: it is damaged.
    """
    kept = files.read_json(folder / NAME)
    try:
        return Probe([int(number) for number in kept["ids"]], torch.tensor(kept["logprobs"], dtype=torch.float32))
    except (KeyError, TypeError, ValueError) as error:
        raise Fault(f"is damaged: {error!r}", file=folder / NAME) from error


def as_served(model: PreTrainedModel) -> PreTrainedModel:
    """Round a model's two xIELU slopes in place as vLLM does, which computes them in bfloat16 whatever its dtype."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, XIELUActivation):
                beta = module.beta.bfloat16()
                positive = softplus(module.alpha_p.bfloat16()).double()
                negative = (beta + softplus(module.alpha_n.bfloat16())).double() - beta.double()
                # the inverse of the softplus that transformers will take of them
                module.alpha_p.copy_(positive.expm1().log())
                module.alpha_n.copy_(negative.expm1().log())
                module.beta.copy_(beta)
                module.eps.copy_(module.eps.bfloat16())
    return model


def limit(dtype: str, *, is_eager: bool) -> float:
    """The largest difference, in nats, of the log-probabilities of vLLM that computes in `dtype`."""
    return max(PROBE_LIMIT[dtype], 0 if is_eager else COMPILED_LIMIT)


def require_own(own: torch.Tensor, folder: Path, probes: Mapping[Path, Probe], largest: float) -> float:
    """Check that an engine's log-probabilities `[seq - 1]` are those of the model in `folder`, and of no other.

    Args:
        own: what the engine says of the first tokens of the folder's probe.
        folder: the model or the adapter that it should serve.
        probes: what transformers says of this model, and of the others that are served.
        largest: the largest difference, in nats.

    Returns:
        The largest difference found, in nats.

    Raises:
        Fault: they are further away, or nearer to another model's.
    """
    apart = {  # how far each model is that reads the probe as the same ids
        other: (own - known.logprobs[: len(own)]).abs()
        for other, known in probes.items()
        if known.ids == probes[folder].ids
    }
    difference = float(apart[folder].max())
    if not difference <= largest:
        raise Fault(
            f"vLLM's log-probabilities differ by up to {difference:.3g} nats from transformers', above {largest}: it "
            "holds other weights",
            file=folder,
        )
    nearest = min(apart, key=lambda other: float(apart[other].mean()))
    if apart[folder].mean() > NEARER * apart[nearest].mean():
        raise Fault(f"vLLM's log-probabilities are nearer to those of {nearest}: it holds other weights", file=folder)
    return difference


def require_used(
    own: torch.Tensor, without: torch.Tensor, folder: Path, base: Path, probes: Mapping[Path, Probe]
) -> None:
    """Check that an engine uses an adapter: that its log-probabilities are not the same bits as without it.

    Raises:
        Fault: they are, though transformers' differ.
    """
    if probes[base].ids != probes[folder].ids or not without.equal(own):
        return
    effect = float((probes[folder].logprobs - probes[base].logprobs).abs().max())
    if effect > PROBE_LIMIT["float32"]:
        away = f"from which the adapter's own are up to {effect:.3g} nats away"
        raise Fault(f"vLLM's log-probabilities are those of {base}, {away}: it is not used", file=folder)
