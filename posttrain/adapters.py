"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685): made, saved and opened so that none is silently without effect.

PEFT takes a list of module names of which one matches, and leaves the others out without a word; it opens an adapter
on any base whose shapes fit. Here either is an error.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from cordee import files, hashes, model_folder
from cordee.compute.tokenizer import copy_tokenizer
from cordee.errors import Fault, UserError, nearest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base_model.json"
"""Beside an adapter: the SHA-256 of each weight file of the model that it was trained on."""
_TIED = {"embed_tokens", "lm_head"}


def lora_config(given: Mapping[str, Any], model: PreTrainedModel) -> LoraConfig:
    """The adapter's settings, checked against the model; without `target_modules`, all linear layers but the head.

    Raises:
        UserError: PEFT refuses a value, or a name matches no module.
    """
    try:
        config = LoraConfig(**{"target_modules": "all-linear", **given}, task_type="CAUSAL_LM")
    except (TypeError, ValueError) as error:
        raise UserError(f"peft.LoraConfig refuses it: {error}", key="lora") from error
    names = [name for name, _ in model.named_modules() if name]
    for field in ("target_modules", "modules_to_save", "exclude_modules", "rank_pattern", "alpha_pattern"):
        _require_matches(given.get(field), names, f"lora.{field}")
    layers = config.layers_to_transform
    for layer in [layers] if isinstance(layers, int) else layers or []:
        if not 0 <= layer < model.config.num_hidden_layers:
            raise UserError(
                f"there is no layer {layer}: the model has {model.config.num_hidden_layers}, from 0",
                key="lora.layers_to_transform",
            )
    require_untied(config, model, key="lora")
    return config


def _require_matches(wanted: Any, names: list[str], key: str) -> None:
    """Check that each name matches a module; a string is one pattern for whole names, as PEFT reads it."""
    if not wanted or wanted == "all-linear":
        return
    if isinstance(wanted, str):
        if not any(re.fullmatch(wanted, name) for name in names):
            raise UserError(f"{wanted!r} matches no module of the model", key=key, hint=nearest(wanted, _last(names)))
        return
    for item in wanted:
        pattern = rf"(.*\.)?({item})" if isinstance(wanted, Mapping) else rf"(.*\.)?{re.escape(item)}"
        if not any(re.fullmatch(pattern, name) for name in names):
            raise UserError(f"{item!r} is no module of the model", key=key, hint=nearest(item, _last(names)))


def _last(names: Iterable[str]) -> set[str]:
    """The last word of each module's name, numbers aside."""
    return {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()}


def require_untied(config: LoraConfig, model: PreTrainedModel, key: str) -> None:
    """Refuse to train one of two tables that are one: merged, each would change the other (peft issue 2368).

    Raises:
        UserError: embeddings are tied, and the adapter changes the embedding or the head.
    """
    if not model.config.tie_word_embeddings:
        return
    targets = config.target_modules
    named = {targets} if isinstance(targets, str) else set(targets or ())
    named |= set(config.modules_to_save or ())
    # A pattern counts too: it may match the tables among others.
    touched = {table for table in _TIED for name in named if name != "all-linear" and _touches(name, table, model)}
    if touched:
        raise UserError(
            f"the model ties its embedding and its head, and the adapter changes {', '.join(sorted(touched))}: merged, "
            "they would no longer be one",
            key=key,
            hint="leave them out of the adapter, or untie the model",
        )


def _touches(name: str, table: str, model: PreTrainedModel) -> bool:
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == table]
    return any(path == name or path.endswith(f".{name}") or re.fullmatch(name, path) for path in paths)


def save(model: PeftModel, folder: Path, *, base: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write an adapter as PEFT does, with the tokenizer and what its base was; `adapter_config.json` comes last.

    The base is recorded relative to the adapter (`../sft@1`), so that the two can move together, and by the hashes of
    its weights, so that another model in its place is noticed.
    """
    beside = folder / ".saving"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = os.path.relpath(base.resolve(), folder.resolve())
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set's order would differ from run to run
    # The vocabulary never changes here; "auto" would look for the base where this process stands.
    model.save_pretrained(beside, state_dict=state_dict, save_embedding_layers=False)
    (beside / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    copy_tokenizer(base, beside)
    files.write_json(beside / BASE, {"files": _hashes(base)})
    files.sync_tree(beside)
    (folder / CONFIG).unlink(missing_ok=True)
    for path in sorted(beside.iterdir(), key=lambda path: path.name == CONFIG):
        path.replace(folder / path.name)
    beside.rmdir()
    files.sync_folder(folder)


def open_adapter(folder: Path, model: PreTrainedModel, base: Path) -> PeftModel:
    """The adapter in a folder, on its base `model`, which was opened from the folder `base`.

    Raises:
        UserError: the folder is no adapter, or one of another base.
        Fault: it is damaged.
    """
    _require_adapter(folder)
    try:
        config = LoraConfig.from_pretrained(folder)
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise Fault(f"can't be opened as an adapter: {error}", file=folder) from error
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise Fault(f"{name} holds values that are not finite", file=folder / WEIGHTS)
    _require_base(folder, base)
    require_untied(config, model, key="adapter")
    try:
        adapted = PeftModel.from_pretrained(model, folder, config=config, local_files_only=True)
    except (RuntimeError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()
        raise UserError(f"does not fit {base}: {' '.join(first[:2])}", file=folder, key="adapter") from error
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if differing := sorted(expected ^ set(weights)):
        raise UserError(
            f"does not fit {base}: {len(differing)} weights have no counterpart, such as {differing[0]}",
            file=folder,
            key="adapter",
        )
    return adapted.eval()


def _require_adapter(folder: Path) -> None:
    """Say what a folder is instead, if it is no LoRA adapter."""
    if not (folder / CONFIG).is_file():
        what = (
            "is a model, not an adapter" if (folder / "config.json").is_file() else f"is no adapter: it has no {CONFIG}"
        )
        raise UserError(what, file=folder, key="adapter")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"holds no weights: it has no {WEIGHTS}", file=folder, key="adapter")
    model_folder.require_undamaged(folder)
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Fault(f"is no JSON: {error}", file=folder / CONFIG) from error
    if kind != "LORA":
        raise UserError(f"is an adapter of the kind {kind!r}: only LoRA is merged", file=folder, key="adapter")


def _require_base(folder: Path, base: Path) -> None:
    """Check that the base is the one that the adapter's own record names; an adapter from elsewhere has none."""
    if not (folder / BASE).is_file():
        return
    recorded = files.read_json(folder / BASE)["files"]
    if recorded != _hashes(base):
        trained_on = files.read_json(folder / CONFIG).get("base_model_name_or_path")
        raise UserError(f"was trained on other weights than those of {base}", file=folder, key="adapter",
                        hint=f"its base was {trained_on}")  # fmt: skip


def _hashes(base: Path) -> dict[str, str]:
    """The SHA-256 of each weight file of a model."""
    return {path.name: hashes.of_file(path) for path in model_folder.weights(base)}
