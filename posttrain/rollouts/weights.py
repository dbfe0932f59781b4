"""The weights of a model that is trained, named as in its checkpoint, with its adapter added: what vLLM is given.

An adapter is never merged in place: taken out again, it would leave the base other bits than it had.
"""

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from cordee.errors import UserError
from posttrain.training.adapters import NAME

PLAIN = "engine: transformers samples from it as it is"


def named(model: PreTrainedModel | PeftModel, *, changed_only: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Names as in a checkpoint, and tensors, one at a time.

    Args:
        model: a whole model, or one with a LoRA adapter.
        changed_only: whether only what training changes is given.

    Raises:
        UserError: the adapter is of a kind that can't be added up here.
    """
    if not isinstance(model, PeftModel):
        whole = {name: _full(weight) for name, weight in model.named_parameters()}
        yield from revert_weight_conversion(model, {**whole, **({} if changed_only else _buffers(model))}).items()
        return
    base = model.get_base_model()
    modules = dict(base.named_modules())
    for name, weight in base.named_parameters():
        if not _is_own(name):
            continue
        place, _, kind = name.rpartition(".")
        owner = place.removesuffix(".base_layer").removesuffix(".original_module").removesuffix(".token_adapter")
        layer = modules.get(owner)
        found = _added(layer, kind, weight)
        is_changed = found is not weight or weight.requires_grad
        if is_changed or not changed_only:
            yield f"{owner}.{kind}", _full(found)
    if not changed_only:
        yield from _buffers(base).items()


def require_addable(model: PreTrainedModel | PeftModel) -> None:
    """See that a model's weights can be given to vLLM.

    Raises:
        UserError: they are quantized, or the adapter is of a kind that can't be added up here.
    """
    if any(getattr(weight, "quant_state", None) is not None for weight in model.parameters()):
        raise UserError("weights that are quantized are not given to vLLM", key="quantization", hint=PLAIN)
    if not isinstance(model, PeftModel):
        return
    conversions = getattr(model.get_base_model(), "_weight_conversions", None) or ()
    if any(isinstance(one, WeightConverter) for one in conversions):
        problem = "an adapter on a model whose weights transformers joins (experts) is not given to vLLM"
        raise UserError(problem, key="lora", hint=PLAIN)
    for name, layer in model.named_modules():
        variants = getattr(layer, "lora_variant", {})
        if isinstance(layer, ParamWrapper) or variants or getattr(layer, "lora_bias", {}).get(NAME):
            problem = f"{name} has an adapter that is more than two matrices, which vLLM is not given"
            raise UserError(problem, key="lora", hint=PLAIN)


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds beside the weights that are trained, such as xIELU's `beta`."""
    stored = model.state_dict()
    return {name: stored[name] for name, _ in model.named_buffers() if name in stored and _is_own(name)}


def _full(weight: torch.Tensor) -> torch.Tensor:
    """A weight gathered from its shards; every process has to ask for it."""
    found = weight.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def _is_own(name: str) -> bool:
    """Whether a parameter is the base's, and not a part of an adapter."""
    words = name.split(".")
    return not any(word.startswith(("lora_", "trainable_tokens_", "modules_to_save")) for word in words)


def _added(layer: torch.nn.Module | None, kind: str, weight: torch.Tensor) -> torch.Tensor:
    """A base's weight with what its layer's adapter adds to it; itself where that is nothing."""
    with torch.no_grad():
        if isinstance(layer, LoraLayer) and kind == "weight" and NAME in layer.scaling:
            if isinstance(layer, Linear) and not layer.fan_in_fan_out:  # in one pass over the weight
                up, down = (_full(part[NAME].weight).to(weight.dtype) for part in (layer.lora_B, layer.lora_A))
                return torch.addmm(_full(weight), up, down, alpha=layer.scaling[NAME])
            return _full(weight) + _full(layer.get_delta_weight(NAME)).to(weight.dtype)
        if isinstance(layer, ModulesToSaveWrapper):
            trained: torch.Tensor = getattr(layer.modules_to_save[NAME], kind)
            return trained
        if isinstance(layer, TrainableTokensWrapper) and kind == "weight":
            return _tokens(layer.token_adapter)
        if isinstance(layer, TrainableTokensLayer) and kind == "weight":
            return _tokens(layer)
    return weight


def _tokens(layer: TrainableTokensLayer) -> torch.Tensor:
    merged: torch.Tensor = layer.get_merged_weights([NAME])
    return merged
