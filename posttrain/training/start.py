"""What a training starts from: a model or an adapter, and the tokenizer with what the recipe changes of it."""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cordee import model_folder, peek
from cordee.compute import model as compute
from cordee.compute import tokenizer_changes
from cordee.compute.tokenizer_changes import Changes
from cordee.errors import UserError, nearest
from posttrain.training.settings import TrlConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
OWN_OPTIONS = {
    **dict.fromkeys(("config", "state_dict", "generation_config", "pretrained_model_name_or_path", "model_args"), ""),
    **dict.fromkeys(("adapter_kwargs", "adapter_name", "ignore_mismatched_sizes", "output_loading_info"), ""),
    **dict.fromkeys(("local_files_only", "use_safetensors", "trust_remote_code", "kwargs"), ""),
    "torch_dtype": "`dtype`, its new name",
    "quantization_config": "the stage's `quantization`",
}
"""Arguments of `from_pretrained` that no recipe sets, each with the key to write instead."""
IN_TRAINING_ALONE = re.compile(r"use_cache|return_dict|output_\w+|router_\w*coef|\w*(dropout|pdrop)\w*")
"""Fields of a model's config without effect on what it computes once it is trained."""


@dataclass(frozen=True)
class Start:
    """The folders that a training starts from."""

    base: Path
    """The whole model."""
    adapter: Path | None
    """The adapter on it."""
    tokenizer: Path
    """The tokenizer's files as they are used and published."""
    notes: tuple[str, ...]
    """What a person should know of them, a line each."""


def find(config: TrlConfig) -> Start:
    """Find the folders, and write the tokenizer's where the recipe changes it; the same each time.

    Raises:
        UserError: `model` is neither, or a key does not fit it.
    """
    config.require_adapter_choice()
    adapter = config.model if model_folder.is_adapter(config.model) else None
    base = base_of(config)
    own = adapter if adapter and (adapter / "tokenizer.json").is_file() else base
    notes = []
    if adapter:
        use = "trained on" if config.adapter != "new" else "merged in memory"
        notes.append(f"{adapter} is an adapter on {base}: {use}")
    changes = Changes(tuple(config.added_tokens), config.chat_template, config.pad_token)
    tokenizer, changed = tokenizer_changes.changed(own, base, changes)
    return Start(base, adapter, tokenizer, (*notes, *changed))


def base_of(config: TrlConfig) -> Path:
    """The folder of the whole model that a training starts from.

    Raises:
        UserError: `model` is no model, or the base of an adapter can't be told.
    """
    if not model_folder.is_adapter(config.model):
        model_folder.require(config.model, "model")
        return config.model
    return model_folder.base_of(config.model, config.base, key="model", base_key="base")


def new_tokens(config: TrlConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the tokens that the recipe adds."""
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in config.added_tokens]


def open_base(config: TrlConfig, base: Path, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The model in the folder `base`, in float32 unless `trainer: {model_init_kwargs: {dtype: …}}` says otherwise.

    `kind` is the class of transformers that opens it.

    Raises:
        UserError: the folder holds no model, or an option is unknown or does not fit it.
        Fault: it is damaged.
    """
    given = config.trainer.get("model_init_kwargs") or {}
    if given:
        _check_options(given, base, trains_adapter=config.trains_adapter)
    options = {"dtype": "float32", **given, **quantized(config)}
    dtype = options.pop("dtype")
    try:
        return compute.open_model(
            base, dtype=None if dtype == "auto" else getattr(torch, dtype), key="model", kind=kind, **options
        )
    except (ImportError, TypeError, StrictDataclassError) as error:
        if not given:
            raise
        raise UserError(f"transformers refuses it: {error}", key="trainer.model_init_kwargs") from error


def _check_options(given: Any, base: Path, *, trains_adapter: bool) -> None:
    """Check what `from_pretrained` is to be given: it takes fields of the model's config as well as its own arguments.

    A field is published in the config of a model that is trained; an adapter's base keeps its own config.

    Raises:
        UserError: names the first that is wrong.
    """
    key = "trainer.model_init_kwargs"
    if not isinstance(given, dict):
        raise UserError(f"must be a mapping, not {given!r}", key=key)
    opener = PreTrainedModel.from_pretrained
    own = {*inspect.signature(opener).parameters, *re.findall(r'kwargs\.pop\("([a-z]\w+)"', inspect.getsource(opener))}
    fields = compute.open_config(base)
    for name in given:
        if name in OWN_OPTIONS:
            instead = OWN_OPTIONS[name] and f", or write {OWN_OPTIONS[name]}"
            raise UserError("the stage sets this itself", key=f"{key}.{name}", hint=f"leave it out{instead}")
        if name not in own and not hasattr(fields, name):
            hint = nearest(name, {*own, *fields.to_dict()} - {*OWN_OPTIONS})
            raise UserError("unknown key", key=f"{key}.{name}", hint=hint)
        is_changed = name not in own and given[name] != getattr(fields, name, None)
        if trains_adapter and is_changed and not IN_TRAINING_ALONE.fullmatch(name):
            problem = "a field of the model's config, which an adapter does not record: its base is opened without it"
            hint = f"write it into config.json of a copy of {base}"
            raise UserError(problem, key=f"{key}.{name}", hint=hint)
    attention = given.get("attn_implementation", "eager")
    for name, value, known in (
        ("dtype", given.get("dtype", "auto"), DTYPES),
        ("attn_implementation", attention, ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())),
    ):
        if value not in known and not (value is attention and "/" in str(value)):  # a kernel of the hub
            raise UserError(f"unknown value {value!r}", key=f"{key}.{name}", hint=nearest(str(value), known))


def quantized(config: TrlConfig) -> dict[str, Any]:
    """What `from_pretrained` is given for `quantization:`.

    Raises:
        UserError: it can't be had here, or transformers refuses it.
    """
    given = config.quantization
    if given is None:
        return {}
    if not config.trains_adapter:
        hint = "`lora: {r: 16}` trains an adapter on them"
        raise UserError("weights that are quantized can't be trained themselves", key="quantization", hint=hint)
    if not torch.cuda.is_available():
        problem = "bitsandbytes quantizes on CUDA, and there is none here"
        raise UserError(problem, key="quantization", hint="leave it out on this machine")
    if not peek.is_installed("bitsandbytes"):
        raise UserError("bitsandbytes is not installed", key="quantization", hint="pip install bitsandbytes")
    names = BitsAndBytesConfig().to_dict().keys() - {"quant_method"}
    for name in given:
        if name not in names:
            raise UserError("unknown key", key=f"quantization.{name}", hint=nearest(name, names))
    try:
        settings = BitsAndBytesConfig(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"transformers.BitsAndBytesConfig refuses it: {error}", key="quantization") from error
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}
