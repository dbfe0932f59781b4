"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685): saved, opened and merged so that none is silently without effect.

PEFT opens an adapter on any base whose shapes fit; here another base is an error.
"""

import functools
import os
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cordee import files, model_folder
from cordee.compute import adapter
from cordee.compute.tokenizer import copy_tokenizer, open_tokenizer
from cordee.errors import UserError
from posttrain.training import adapter_sums

NAME, REFERENCE = "default", "ref"
"""What PEFT calls the adapter of a model that has one; what TRL calls its copy of one that is trained on."""


def prepare(model: torch.nn.Module) -> None:
    """Mend what TRL makes of an adapter: its copy for the reference, and the head that its loss reads.

    TRL copies the weights whose names hold `.default.`; those of embeddings and of trained tokens end with it. And its
    loss asks the head for a bias, an attribute that PEFT's layer of trained tokens lacks.
    """
    if not isinstance(model, PeftModel):
        return
    if REFERENCE in model.peft_config:
        if model.peft_config[NAME].bias != "none":
            problem = "it has trained biases, which are not the reference's while it is off"
            raise UserError(problem, key="model", hint="merge it, and train an adapter on the model that it gives")
        weights = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
        set_peft_model_state_dict(model, weights, adapter_name=REFERENCE)
        # Resumed from a folder that holds a copy as well, `Trainer` would open the copy alone.
        model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=[NAME])
    head = model.get_base_model().get_output_embeddings()
    if isinstance(head, AuxiliaryTrainingWrapper) and not hasattr(head, "bias"):
        head.bias = None


def save(
    model: PeftModel,
    folder: Path,
    *,
    base: Path,
    tokenizer: Path | None = None,
    earlier: Path | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter as PEFT does, with the tokenizer and what its base was; `adapter_config.json` comes last.

    The base is recorded relative to the adapter (`../sft@1`), so that the two can move together, and by the hashes of
    its weights, so that another model in its place is noticed. `tokenizer` is the folder of its tokenizer, if not the
    base's. `earlier` is an adapter of the base that was merged into it before this one was trained: the sum of the two
    is written.
    """
    config = model.peft_config[NAME]
    config.base_model_name_or_path = os.path.relpath(base.resolve(), folder.resolve())
    for field in ("target_modules", "target_parameters"):
        if isinstance(names := getattr(config, field), set):
            setattr(config, field, sorted(names))  # a set's order would differ from run to run
    with files.replaced(folder, last=model_folder.ADAPTER_CONFIG) as beside:
        # The vocabulary never changes here; "auto" would look for the base where this process stands.
        model.save_pretrained(beside, state_dict=state_dict, save_embedding_layers=False, selected_adapters=[NAME])
        if earlier:
            adapter_sums.add(earlier, beside, model)
        (beside / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        copy_tokenizer(tokenizer or base, beside)
        _name_class(beside, open_tokenizer(tokenizer or base))
        files.write_json(beside / model_folder.ADAPTERS_BASE, {"files": model_folder.weight_hashes(base)})


def _name_class(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Name a tokenizer's class and its special tokens, where only a model's config beside it would tell them."""
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = files.read_json(path) if path.is_file() else {}
    if "tokenizer_class" not in settings:
        named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        files.write_json(path, named | settings | {"tokenizer_class": type(tokenizer).__name__})


def open_adapter(folder: Path, model: PreTrainedModel, base: Path, *, is_trainable: bool = False) -> PeftModel:
    """The LoRA adapter in a folder, on its base `model`, which was opened from the folder `base`.

    Raises:
        UserError: the folder is no adapter, one of another base, or one of another method than LoRA.
        Fault: it is damaged.
    """
    model_folder.require_adapter(folder, base, "adapter")
    kind = files.read_json(folder / model_folder.ADAPTER_CONFIG).get("peft_type")
    if kind != "LORA":
        raise UserError(f"is an adapter of the kind {kind!r}: only LoRA is known here", file=folder, key="adapter")
    return adapter.open_on(folder, model, base, key="adapter", is_trainable=is_trainable)


def merge(adapted: PeftModel) -> PreTrainedModel:
    """The base with its adapter merged into it; an embedding and a head that then differ are two from there on.

    Raises:
        UserError: PEFT can't merge it.
    """
    model = adapted.get_base_model()
    was_one = model.config.get_text_config().tie_word_embeddings
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if was_one and head is not None:
        own = getattr(head, "base_layer", getattr(head, "original_module", head))
        own = getattr(own, "base_layer", own)
        # one parameter would be changed by both, or by one for the other
        own.weight = torch.nn.Parameter(own.weight.detach().clone(), requires_grad=False)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"PEFT can't merge it: {error}", key="adapter") from error
    if was_one and head is not None:
        embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
        is_one = torch.equal(embedding.weight, head.weight)
        merged.config.tie_word_embeddings = merged.config.get_text_config().tie_word_embeddings = is_one
        if is_one:
            merged.tie_weights()
    return cast("PreTrainedModel", merged.requires_grad_(True))
