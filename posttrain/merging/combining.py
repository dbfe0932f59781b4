"""Several LoRA adapters of one base as one, combined by PEFT and compared with arithmetic of their products."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from transformers import PreTrainedModel

from cordee import files, model_folder
from cordee.compute import adapter
from cordee.errors import Fault, UserError
from posttrain.merging.settings import Combined, Weighted
from posttrain.training import adapter_sums, adapters

COMBINED = "combined"
EXACT = 1e-5
"""How far, relative to it, `cat` may be from the weighted sum: float32 rounds."""
SUMS = ("cat", "linear", "svd")
"""The combinations that stand for the weighted sum."""


@dataclass(frozen=True)
class Sum:
    """How far a combination is from the weighted sum of the adapters' products, over all modules."""

    relative_error: float
    """Frobenius norm of the difference, divided by that of the sum."""
    modules: int
    """Modules that any of the adapters changes."""


def one_base(parts: Sequence[Weighted], given: Path | None) -> Path:
    """The folder of the model that all adapters were trained on.

    Raises:
        UserError: they were trained on several or on another than was given, or one is not a pair of matrices alone.
    """
    for part in parts:
        _require_plain(part.path)
    bases = [model_folder.base_of(part.path, given, key="adapters", base_key="model") for part in parts]
    known = model_folder.weight_hashes(bases[0])
    for part, base in zip(parts, bases, strict=True):
        if base.resolve() != bases[0].resolve() and model_folder.weight_hashes(base) != known:
            problem = f"was trained on {base}, and {parts[0].path} on {bases[0]}: they can't be added"
            raise UserError(problem, file=part.path, key="adapters")
    return bases[0]


def combine(parts: Sequence[Weighted], how: Combined, model: PreTrainedModel, base: Path) -> PeftModel:
    """The base with an adapter that stands for all of them.

    Args:
        parts: at least two adapters, and their weights.
        how: the combination.
        model: the base, opened.
        base: its folder.

    Raises:
        UserError: an adapter does not fit the base, or PEFT can't combine them.
        Fault: one is damaged, or PEFT's exact sum is none.
    """
    adapted = adapters.open_adapter(parts[0].path, model, base)
    names = [adapters.NAME, *(f"adapter{number}" for number in range(2, len(parts) + 1))]
    for name, part in zip(names[1:], parts[1:], strict=True):
        _open_beside(adapted, part.path, base, name)
    weights = {name: part.weight for name, part in zip(names, parts, strict=True)}
    for name in names:
        _name_modules(adapted, name)
    try:
        adapted.add_weighted_adapter(
            names, list(weights.values()), COMBINED,
            combination_type=how.combination,
            svd_rank=how.rank,
            svd_full_matrices=False,
            density=how.density,
            majority_sign_method=how.majority_sign_method,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        hint = "`combination: cat` takes adapters of any ranks"
        raise UserError(f"PEFT can't combine them: {error}", key="combination", hint=hint) from error
    adapted.set_adapter(COMBINED)
    return adapted.eval()


def distance(adapted: PeftModel, parts: Sequence[Weighted]) -> Sum:
    """How far the combined adapter is from the sum of weight · scaling · B A over the adapters, computed in float64."""
    names = [adapters.NAME, *(f"adapter{number}" for number in range(2, len(parts) + 1))]
    error = total = 0.0
    modules = 0
    for layer in adapted.modules():
        if not isinstance(layer, LoraLayer):
            continue
        expected = [part.weight * delta for name, part in zip(names, parts, strict=True)
                    if (delta := _product(layer, name)) is not None]  # fmt: skip
        if not expected:
            continue
        wanted, found = torch.stack(expected).sum(0), _product(layer, COMBINED)
        difference = wanted if found is None else wanted - found
        error += float(difference.square().sum())
        total += float(wanted.square().sum())
        modules += 1
    return Sum(math.sqrt(error / total) if total else float(error > 0), modules)


def require_exact(how: Combined, found: Sum) -> None:
    """See that `cat` is the sum that it stands for.

    Raises:
        Fault: it is another.
    """
    if how.combination == "cat" and not found.relative_error <= EXACT:
        away = f"{found.relative_error:.3g} of its size, more than {EXACT}"
        raise Fault(f"PEFT's sum of the adapters is away from the sum of their products by {away}", key="adapters")


def _require_plain(folder: Path) -> None:
    """Refuse adapters that are not pairs of matrices alone.

    Raises:
        UserError: names the field.
    """
    if not model_folder.is_adapter(folder):
        raise UserError("is no adapter", file=folder, key="adapters", hint="`models:` averages whole models")
    config: Mapping[str, Any] = files.read_json(folder / model_folder.ADAPTER_CONFIG)
    found = adapter_sums.beyond_matrices(config)
    if found:
        hint = "merge each alone, and average the models (`models:`)"
        raise UserError(f"sets {found[0]}, and PEFT combines no such adapter", file=folder, key="adapters", hint=hint)


def _open_beside(adapted: PeftModel, folder: Path, base: Path, name: str) -> None:
    """Open a further adapter on a base.

    Raises:
        UserError: it does not fit.
        Fault: it is damaged.
    """
    model_folder.require_adapter(folder, base, "adapters")
    stored = adapter.weights(folder)
    try:
        adapted.load_adapter(str(folder), name, local_files_only=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        problem = " ".join(str(error).strip().splitlines()[:2])
        raise UserError(f"does not fit {base}: {problem}", file=folder, key="adapters") from error
    expected = set(get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False))
    named = convert_peft_adapter_state_dict_for_transformers(adapted, adapted.peft_config[name], stored)
    if differing := sorted(expected ^ set(named)):
        problem = f"does not fit {base}: {len(differing)} weights have no counterpart, such as {differing[0]}"
        raise UserError(problem, file=folder, key="adapters")


def _name_modules(adapted: PeftModel, name: str) -> None:
    """Have an adapter's settings name its modules one by one, without what else PEFT would take over from the first.

    The new adapter is given the settings of the first: its layers, and the scaling of rsLoRA, which would then be
    applied twice.
    """
    config = adapted.peft_config[name]
    config.target_modules = {
        place for place, layer in adapted.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and (name in layer.lora_A or name in layer.lora_embedding_A)
    }  # fmt: skip
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.use_rslora = False


def _product(layer: LoraLayer, name: str) -> torch.Tensor | None:
    """Scaling · B A of an adapter in a layer, float64; None where it has none there."""
    if name in layer.lora_A:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    elif name in layer.lora_embedding_A:
        down, up = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        return None
    return layer.scaling[name] * up.detach().double() @ down.detach().double()
