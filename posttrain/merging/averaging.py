"""The weighted average of models of one shape, weight by weight in float64.

An exponential moving average over checkpoints, θ̄ᵢ = d θ̄ᵢ₋₁ + (1 - d) θᵢ, is such an average: the first has the weight
dⁿ⁻¹, each further one (1 - d) dⁿ⁻ⁱ.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from cordee import files, model_folder
from cordee.compute.model import open_model
from cordee.compute.tokenizer import difference
from cordee.errors import Fault, UserError

NO_SHAPE = {
    *("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
"""Fields of a config without effect on what the weights mean."""
Average = dict[str, torch.Tensor]
EFFECT = 1.0
"""How far a saved weight may be from the average, in units of its dtype's last place."""


def checkpoints(artifact: Path) -> list[Path]:
    """The models that a training has published on its way, by their steps, and the one that it ended with.

    Raises:
        UserError: there are none.
    """
    steps = [folder for folder in (artifact / "checkpoints").glob("*") if folder.name.isdecimal()]
    found = sorted(steps, key=lambda folder: int(folder.name))
    if not found:
        hint = "`save_steps` of the training publishes them"
        raise UserError("has no checkpoints", file=artifact, key="checkpoints", hint=hint)
    return [*found, artifact]


def shares(weights: Sequence[float], decay: float | None) -> list[float]:
    """The weight of each model in the average, in sum 1.

    Args:
        weights: as they were given.
        decay: of an exponential moving average over the models in their order, in place of the weights.

    Raises:
        UserError: the weights add up to nothing.
    """
    if decay is not None:
        last = len(weights) - 1
        return [(1 - decay) * decay ** (last - at) if at else decay**last for at in range(len(weights))]
    total = sum(weights)
    if not total:
        raise UserError("the weights add up to 0", key="models")
    return [weight / total for weight in weights]


def average(folders: Sequence[Path], weights: Sequence[float]) -> tuple[PreTrainedModel, Average, torch.dtype]:
    """The average of the models in some folders.

    Memory holds one model and a copy of it in float64.

    Returns:
        the model in float32, its weights in float64, and the dtype that they are stored in.

    Raises:
        UserError: two are not of one shape, or encode differently.
        Fault: one is damaged.
    """
    model = open_model(folders[0], key="models")
    total: Average = {}
    dtype = model.dtype
    kinds = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
    for folder, weight in zip(folders, weights, strict=True):
        one = model if folder is folders[0] else open_model(folder, key="models")
        _require_alike(folder, folders[0], {name: (v.shape, v.dtype) for name, v in one.state_dict().items()}, kinds)
        for name, value in one.state_dict().items():
            if not value.is_floating_point():
                continue
            part = weight * value.double()
            total[name] = total[name] + part if name in total else part
    model = model.float()
    state = model.state_dict()
    for name, value in total.items():
        state[name].copy_(value)
    return model.eval(), total, dtype


def _require_alike(folder: Path, first: Path, kinds: Mapping[str, object], known: Mapping[str, object]) -> None:
    """Check that a model has the shape, the dtype and the tokenizer of the first.

    Raises:
        UserError: it has not.
    """
    if folder == first:
        return
    told = [model_folder.language_config(files.read_json(place / "config.json")) for place in (folder, first)]
    keys = {key for one in told for key in one} - NO_SHAPE
    if names := sorted(key for key in keys if told[0].get(key) != told[1].get(key)):
        problem = f"its config differs from that of {first} in {', '.join(names[:3])}"
        raise UserError(problem, file=folder, key="models")
    if names := sorted(name for name in {*kinds, *known} if kinds.get(name) != known.get(name)):
        problem = f"is not of the shape of {first}: {len(names)} weights differ, such as {names[0]}"
        raise UserError(problem, file=folder, key="models")
    there = [(place / "tokenizer.json").is_file() for place in (folder, first)]
    if all(there) and (problem := difference(folder, first)):
        raise UserError(f"encodes differently from {first}: {problem}", file=folder, key="models")


def require_saved(folder: Path, saved: PreTrainedModel, expected: Average) -> float:
    """Compare saved weights with the average; returns the largest difference, in units of the last place.

    Raises:
        Fault: one is further away than rounding explains.
    """
    largest, state = 0.0, saved.state_dict()
    for name, value in expected.items():
        step = torch.finfo(state[name].dtype).eps * value.abs().clamp(min=torch.finfo(state[name].dtype).tiny)
        largest = max(largest, float(((state[name].double() - value).abs() / step).max()))
        if not largest <= EFFECT:
            raise Fault(f"{name} is not the average: {largest:.3g} units in the last place away", file=folder)
    return largest
