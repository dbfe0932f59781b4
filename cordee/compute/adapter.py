"""Adapters that are measured without being merged: opened on their base by PEFT, or served by vLLM beside it.

vLLM reads only a few fields of `adapter_config.json` and takes no notice of the others: those are refused here.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from cordee import files, model_folder
from cordee.chat import spans
from cordee.compute import model as compute
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import Fault, UserError

MERGE_FIRST = "merge the adapter first, or say engine: transformers"
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is."""
_SERVED = {  # what vLLM reads, and what matters only while an adapter is made
    *("r", "lora_alpha", "target_modules", "use_rslora", "peft_type", "task_type", "base_model_name_or_path"),
    *("auto_mapping", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "megatron_config", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config"),
}
_TABLES = {"trainable_token_indices", "modules_to_save"}
"""Fields by which an adapter may change the embedding and the head."""
_NOT_SET: tuple[Any, ...] = (None, False, "none", {}, [])
_placed: list[tempfile.TemporaryDirectory[str]] = []


def placed_on(folder: Path, base: Path) -> Path:
    """An adapter's folder whose config names `base`: itself, or links to its files that last as long as this process.

    Raises:
        UserError: the folder is no adapter, or the adapter of another base.
        Fault: it is damaged, which the links would not tell.
    """
    model_folder.require_adapter(folder, base)
    model_folder.require_undamaged(folder, [path.relative_to(folder).as_posix() for path in files.walk(folder)])
    found = model_folder.recorded_base(folder)
    if found and found.resolve() == base.resolve():
        return folder
    kept = tempfile.TemporaryDirectory(prefix="cordee-adapter-")
    _placed.append(kept)  # deleted when the process ends
    place = Path(kept.name) / folder.resolve().name
    place.mkdir()
    for path in folder.iterdir():
        if path.name != model_folder.ADAPTER_CONFIG:
            (place / path.name).symlink_to(path.resolve())
    config = {**_config(folder), "base_model_name_or_path": str(base.resolve())}
    files.write_json(place / model_folder.ADAPTER_CONFIG, config)
    return place


def open_served(folder: Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model in a folder, on the CPU; an adapter on its base, as the `lm_eval` command opens it.

    Raises:
        UserError: the folder is no model, or an adapter that does not fit its base.
        Fault: it is damaged.
    """
    model_folder.require_served(folder)
    base = model_folder.served_base(folder)
    opened = compute.open_model(base, dtype=dtype)
    if base == folder:
        return opened
    return open_on(folder, opened, base)


def open_on(
    folder: Path, model: PreTrainedModel, base: Path, *, key: str | None = None, is_trainable: bool = False
) -> PeftModel:
    """The adapter in a folder on its base `model`, which was opened from the folder `base`.

    The embedding and the head are given rows for the tokens that the adapter's tokenizer adds.

    Raises:
        UserError: the folder is no adapter, or does not fit the base.
        Fault: it is damaged.
    """
    stored = fit_tables(folder, model, base, key)
    tables = stored_tables(stored, model)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), local_files_only=True, is_trainable=is_trainable)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        problem = " ".join(str(error).strip().splitlines()[:2])
        raise UserError(f"does not fit {base}: {problem}", file=folder, key=key) from error
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # as PEFT converts what transformers 4 named otherwise: a pair of matrices for each expert, other prefixes
    named = convert_peft_adapter_state_dict_for_transformers(adapted, adapted.active_peft_config, stored)
    if differing := sorted((expected ^ set(named)) - tables):
        problem = f"does not fit {base}: {len(differing)} weights have no counterpart, such as {differing[0]}"
        raise UserError(problem, file=folder, key=key)
    return adapted if is_trainable else adapted.eval()


def fit_tables(folder: Path, model: PreTrainedModel, base: Path, key: str | None = None) -> dict[str, torch.Tensor]:
    """Give a base the rows that its adapter needs, which may have been trained when the embedding had grown.

    Returns:
        The tensors of the adapter.

    Raises:
        UserError: the folder is no adapter of this base.
        Fault: it is damaged.
    """
    model_folder.require_adapter(folder, base, key)
    stored = weights(folder)
    compute.grow_tables(model, table_rows(folder, stored, model))
    return stored


def table_rows(folder: Path, stored: Mapping[str, torch.Tensor], model: PreTrainedModel) -> int:
    """How many rows an adapter, whose tensors are `stored`, needs of its base's embedding; 0: as many as there are."""
    trained = _config(folder).get("trainable_token_indices") or []
    lists = trained.values() if isinstance(trained, Mapping) else [trained]
    rows = [stored[name].shape[0] for name in stored_tables(stored, model)]
    return max([*rows, *(number + 1 for ids in lists for number in ids)], default=0)


def stored_tables(stored: Mapping[str, torch.Tensor], model: PreTrainedModel) -> set[str]:
    """The names of the whole embedding and head among an adapter's weights, as PEFT stores them after a change."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is table for table in tables)]
    ends = ("", "base_layer.", "original_module.", "modules_to_save.")
    return {f"base_model.model.{name}.{end}weight" for name in names for end in ends} & stored.keys()


def stop_token_ids(folder: Path) -> list[int]:
    """The ids that end a generation of the model in a folder; of an adapter those that it would have merged."""
    base = model_folder.served_base(folder)
    stops = compute.stop_token_ids(base)
    end = None if base == folder else spans.end_of_turn(open_tokenizer(model_folder.tokenizer_of(folder)))
    return stops if end is None or end in stops else [*stops, end]


def remark(folder: Path) -> str:
    """That an adapter has no effect, where its matrices B are zero, as they are before training."""
    if not model_folder.is_adapter(folder):
        return ""
    return "" if moving(folder) else "the adapter has no effect: all its matrices B are zero"


def moving(folder: Path) -> int:
    """How many tensors of an adapter are not zero, its matrices A aside, which alone have no effect."""
    return sum(bool(tensor.any()) for name, tensor in weights(folder).items() if "lora_A" not in name)


def rank(folder: Path) -> int:
    """The rank of a LoRA adapter."""
    return int(_config(folder)["r"])


def require_vllm_serves(folder: Path, key: str | None = None) -> None:
    """Check that an adapter is one that vLLM serves without merging.

    Raises:
        UserError: it has what vLLM does not read, such as DoRA's magnitudes.
    """
    config = _config(folder)
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    refused = sorted(name for name, value in config.items() if value not in _NOT_SET and name not in _SERVED)
    refused += [f"init_lora_weights: {start}"] if start not in PLAIN_STARTS else []
    if kind != "LORA":
        hint = "engine: transformers does"
        raise UserError(f"vLLM serves no adapter with peft_type: {kind}", file=folder, key=key, hint=hint)
    ends = (".lora_A.weight", ".lora_B.weight")
    refused = refused or sorted(name for name in weights(folder) if not name.endswith(ends))[:1]
    if refused:
        # lm-eval's transformers backend opens no adapter that changes one table for the embedding and the head
        hint = "merge the adapter first" if _TABLES.intersection(refused) else MERGE_FIRST
        raise UserError(f"vLLM serves no adapter with {', '.join(refused)}", file=folder, key=key, hint=hint)


def _config(folder: Path) -> dict[str, Any]:
    return dict(files.read_json(folder / model_folder.ADAPTER_CONFIG))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter.

    Raises:
        Fault: they are damaged.
    """
    model_folder.require_undamaged(folder)
    try:
        found: dict[str, torch.Tensor] = load_file(folder / model_folder.ADAPTER_WEIGHTS)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise Fault(f"can't be opened as an adapter: {error}", file=folder) from error
    for name, tensor in found.items():
        if not compute.is_finite(tensor):
            raise Fault(f"{name} holds values that are not finite", file=folder)
    return found
