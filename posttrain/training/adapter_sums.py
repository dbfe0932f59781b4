"""The sum of two LoRA adapters of one base as one adapter.

Each adds `scaling · B A` to a weight; side by side, `[B₁ s₁, B₂ s₂] [A₁; A₂]` adds both, with a scaling of 1.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import save_file
from transformers import PreTrainedModel

from cordee.compute.adapter import PLAIN_STARTS
from cordee.errors import UserError

PREFIX = "base_model.model."
SIDES = {"A": (("lora_A.weight", 0), ("lora_embedding_A", 0)), "B": (("lora_B.weight", 1), ("lora_embedding_B", 1))}
"""How the two matrices are called, in linear layers and embeddings, and the dimension of the rank."""
BEYOND_MATRICES = ("use_dora", "lora_bias", "target_parameters")
OWN_WEIGHTS = ("modules_to_save", "trainable_token_indices")
"""Fields of LoraConfig by which an adapter is more than two matrices in a module; the second are for whole weights."""


def require_addable(earlier: LoraConfig, later: LoraConfig, folder: Path) -> None:
    """Refuse adapters whose sum is no adapter.

    Raises:
        UserError: names the setting.
    """
    for which, config in ((f"{folder}", earlier), ("`lora:`", later)):
        found = beyond_matrices(vars(config))
        if config is later:  # which is published with its own
            found = [name for name in found if name not in OWN_WEIGHTS]
        if found:
            raise UserError(
                f"{which} sets {found[0]}, and the sum of such an adapter and another is none",
                key="adapter",
                hint="merge the earlier one first (posttrain.merge), and start from the model that it gives",
            )


def beyond_matrices(settings: Mapping[str, Any]) -> list[str]:
    """The settings, by their fields of `peft.LoraConfig`, by which an adapter is more than two matrices in a module."""
    found = [name for name in (*BEYOND_MATRICES, *OWN_WEIGHTS) if settings.get(name)]
    found += ["bias"] if settings.get("bias", "none") != "none" else []
    return found + (["init_lora_weights"] if settings.get("init_lora_weights", True) not in PLAIN_STARTS else [])


def config_of(folder: Path, model: PreTrainedModel) -> LoraConfig:
    """The settings of an adapter as PEFT takes them for a model: experts of transformers 4 are parameters."""
    config = LoraConfig.from_pretrained(folder)
    convert_peft_config_for_transformers(config, model, None)
    return config


def add(earlier: Path, folder: Path, model: PeftModel) -> None:
    """Add an earlier adapter to the one in a folder, in place; `model` is the base with the later one."""
    configs = [LoraConfig.from_pretrained(place) for place in (earlier, folder)]
    stored = [load_peft_weights(str(place), device="cpu") for place in (earlier, folder)]
    stored[0] = convert_peft_adapter_state_dict_for_transformers(model, configs[0], stored[0])
    modules = [_modules(weights) for weights in stored]
    total = {name: tensor for name, tensor in stored[1].items() if not _is_lora(name)}
    ranks: dict[str, int] = {}
    for name in sorted({*modules[0], *modules[1]}):
        parts = [
            (weights, _scaling(config, name, weights))
            for config, weights in zip(configs, (of.get(name, {}) for of in modules), strict=True)
            if weights
        ]
        for kind in parts[0][0]:
            is_up, dim = next((side == "B", dim) for side, kinds in SIDES.items() for k, dim in kinds if k == kind)
            joined = [weights[kind] * scaling if is_up else weights[kind] for weights, scaling in parts]
            total[f"{PREFIX}{name}.{kind}"] = torch.cat(joined, dim).contiguous()
            ranks[name] = total[f"{PREFIX}{name}.{kind}"].shape[dim]
    later = configs[1]
    later.target_modules = sorted(ranks)
    later.layers_to_transform = later.layers_pattern = later.exclude_modules = None
    later.r = later.lora_alpha = max(ranks.values())
    fewer = {name: rank for name, rank in ranks.items() if rank != later.r}
    later.rank_pattern, later.alpha_pattern, later.use_rslora = dict(fewer), dict(fewer), False
    later.save_pretrained(str(folder))
    save_file(total, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _is_lora(name: str) -> bool:
    return any(name.endswith(kind) for kinds in SIDES.values() for kind, _ in kinds)


def _modules(weights: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """An adapter's matrices by module and kind."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        for kinds in SIDES.values():
            for kind, _ in kinds:
                if name.endswith(f".{kind}"):
                    found.setdefault(name.removeprefix(PREFIX).removesuffix(f".{kind}"), {})[kind] = tensor
    return found


def _scaling(config: LoraConfig, module: str, weights: Mapping[str, torch.Tensor]) -> float:
    """What a module's `B A` is multiplied by."""
    rank = next(weights[kind].shape[dim] for kind, dim in SIDES["A"] if kind in weights)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return float(alpha) / (math.sqrt(rank) if config.use_rslora else rank)
