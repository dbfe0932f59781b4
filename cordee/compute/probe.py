"""A model's log-probabilities on a short text, kept as `probe.json` beside its weights.

An engine that serves these weights gives the same log-probabilities, so it can be checked without opening the model a
second time.
"""

from collections.abc import Sequence
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
