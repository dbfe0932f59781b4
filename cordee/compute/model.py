"""Opening and saving Hugging Face model folders: what is not whole is named, and never silently filled in.

`from_pretrained` initialises weights that a checkpoint lacks at random, and warns; here that is an error.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cordee import files, model_folder
from cordee.chat.formats import Limits
from cordee.compute.tokenizer import copy_tokenizer, open_tokenizer
from cordee.errors import Fault

END_OF_TURN = "<|assistant_end|>"
_NOT_OWN = {"bos_token_id", "pad_token_id", "eos_token_id", "transformers_version", "_from_model_config"}


def open_model(
    folder: Path, *, dtype: torch.dtype | None = None, key: str | None = None, **options: Any
) -> PreTrainedModel:
    """The causal language model in a folder, on the CPU, in `dtype` (None: the one it is stored in).

    `options` go to `from_pretrained`, such as `attn_implementation`.

    Raises:
        UserError: the folder is no model.
        Fault: it is one, and it is damaged, incomplete or does not fit its own config.
    """
    model_folder.require(folder, key)
    model_folder.require_undamaged(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, in one line with the names
            output_loading_info=True,
            **options,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise Fault(f"can't be opened as a model: {error}", file=folder) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(what):
            named = sorted(str(name) for name in report[what])
            more = f" and {len(named) - 3} more" if len(named) > 3 else ""
            raise Fault(f"{what.replace('_', ' ')}: {', '.join(named[:3])}{more}", file=folder)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise Fault(f"{name} holds values that are not finite", file=folder)
    return model


def save_model(
    model: PreTrainedModel, folder: Path, *, tokenizer: Path, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a model folder: config, safetensors, generation config, and the tokenizer files of `tokenizer`.

    A folder that is not there yet appears at once and whole. In one that is (an artifact's own), each file appears
    whole, and `config.json`, without which no reader takes the folder for a model, goes first and comes last.
    `state_dict` stands for the model's own where weights were gathered from shards.
    """
    fresh = not folder.exists()
    beside = folder.with_name(f".{folder.name}.saving") if fresh else folder / ".saving"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    opened = open_tokenizer(tokenizer)
    model.generation_config = _generation_config(model.generation_config, opened)
    model.save_pretrained(beside, state_dict=state_dict)
    copy_tokenizer(tokenizer, beside)
    files.sync_tree(beside)
    if fresh:
        beside.rename(folder)
        files.sync_folder(folder.parent)
        return
    (folder / "config.json").unlink(missing_ok=True)
    for path in sorted(beside.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(folder / path.name)
    beside.rmdir()
    files.sync_folder(folder)


def sequence_limits(model: PreTrainedModel, max_length: int | None) -> Limits:
    """How long a sequence and how large a token id may be: of `max_length`, and of the model itself."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Limits(max_length, positions, model.get_input_embeddings().weight.shape[0])


def stop_token_ids(folder: Path) -> list[int]:
    """The ids that end a generation of the model in a folder: its own, the end of the text, and of a turn."""
    config = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    own = config.eos_token_id if config else None
    return _ends(open_tokenizer(folder), own if isinstance(own, list) else [own])


def _generation_config(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The model's own settings with the tokenizer's special tokens; every end stops a generation."""
    own = config.to_diff_dict() if config else {}
    ends = own.get("eos_token_id")  # a single one may be its architecture's default, of another tokenizer
    return GenerationConfig(
        **{name: value for name, value in own.items() if name not in _NOT_OWN},
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_ends(tokenizer, ends if isinstance(ends, list) else []),
    )


def _ends(tokenizer: PreTrainedTokenizerBase, more: Sequence[int | None]) -> list[int]:
    """The end of the text, of the assistant's turn where there is one, and `more`, each once."""
    ends = [tokenizer.eos_token_id]
    if END_OF_TURN in tokenizer.get_vocab():
        ends.append(tokenizer.convert_tokens_to_ids(END_OF_TURN))
    return [int(end) for end in dict.fromkeys([*ends, *more]) if end is not None]
