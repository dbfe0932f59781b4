"""Opening and saving Hugging Face model folders: what is not whole is named, and never silently filled in.

`from_pretrained` initialises weights that a checkpoint lacks at random, and warns; here that is an error.
"""

import contextlib
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cordee import files, model_folder
from cordee.chat.formats import Limits
from cordee.chat.templates import Template
from cordee.compute import probe
from cordee.compute.tokenizer import copy_tokenizer, open_tokenizer, tokenizer_remark
from cordee.errors import Fault, UserError

GENERATION_CONFIG = "generation_config.json"


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
            use_safetensors=model_folder.weights(folder)[0].suffix == ".safetensors",
            ignore_mismatched_sizes=True,  # reported below, in one line with the names
            output_loading_info=True,
            **options,
        )
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, ValueError, KeyError) as error:
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
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: Path,
    chats: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a model folder: config, safetensors, generation config, and tokenizer.

    The folder `tokenizer` holds the tokenizer's files and, where it is the model that was trained on, its maker's
    `generation_config.json`: both stay as they are. Where it was trained on `chats`, what ends an answer ends a
    generation too.
    A folder that is not there yet appears at once and whole. In one that is (an artifact's own), each file appears
    whole, and `config.json`, without which no reader takes the folder for a model, goes first and comes last.
    `state_dict` replaces the model's own where weights were gathered from shards.
    """
    fresh = not folder.exists()
    beside = folder.with_name(f".{folder.name}.saving") if fresh else folder / ".saving"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    model.generation_config = GenerationConfig()  # transformers refuses to save some that makers publish
    model.save_pretrained(beside, state_dict=state_dict)
    opened = open_tokenizer(tokenizer)
    files.write_json(beside / GENERATION_CONFIG, _generation_config(tokenizer, opened, chats=chats))
    copy_tokenizer(tokenizer, beside)
    probe.write(beside, probe.measure(open_model(beside, dtype=torch.float32), opened(probe.TEXT)["input_ids"]))
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
    """The ids that end a generation of the model in a folder, as its `generation_config.json` has them.

    Where that names none: the tokenizer's eos, what its chat template ends an answer with, and the added tokens that
    `config.json` names.
    """
    return _as_list(_generation_config(folder, open_tokenizer(folder)).get("eos_token_id"))


def remarks(folder: Path) -> list[str]:
    """What a person should know of a model's tokenizer and of the tokens that end its generations, a line each."""
    said = [remark] if (remark := tokenizer_remark(folder)) else []
    tokenizer, stops = open_tokenizer(folder), stop_token_ids(folder)
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    file, named, _ = _named_stops(folder)
    for number in named:
        if number not in tokenizer.added_tokens_decoder:
            what = f"{names[number]!r}, an ordinary token" if number in names else "which no token has"
            then = "ends every generation" if number in stops else "is taken for a default and not used"
            said.append(f"{file} names {number} as eos_token_id, {what}: it {then}")
    end = _end_of_turn(tokenizer)
    if end is not None and end not in stops:
        shown = ", ".join(repr(names.get(number)) for number in stops)
        said.append(f"the chat template ends an answer with {names[end]!r}, and a generation ends with {shown}")
    return said


def _generation_config(folder: Path, tokenizer: PreTrainedTokenizerBase, *, chats: bool = False) -> dict[str, Any]:
    """The maker's `generation_config.json`; with stop tokens of the tokenizer where the maker names none.

    A lone id that transformers may have taken from an architecture's defaults is believed where it is the tokenizer's
    eos or ends an answer: in another vocabulary, the default is some other token.
    """
    path, added = folder / GENERATION_CONFIG, tokenizer.added_tokens_decoder
    special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    fields: dict[str, Any] = dict(files.read_json(path)) if path.is_file() else special
    file, named, is_default = _named_stops(folder)
    end_of_turn = _end_of_turn(tokenizer)
    ends: list[int | None] = [*named]
    if is_default and (file != GENERATION_CONFIG or not {tokenizer.eos_token_id, end_of_turn} >= {*named}):
        ends = [tokenizer.eos_token_id, end_of_turn, *(number for number in named if number in added)]
        fields.pop("_from_model_config", None)
    elif chats:
        ends = [*named, end_of_turn]
    own = [end for end in dict.fromkeys(ends) if end is not None]
    return fields if own == named else fields | {"eos_token_id": own}


def _named_stops(folder: Path) -> tuple[str, list[int], bool]:
    """Where a model's stop tokens are named, their ids, and whether they may be no more than defaults."""
    for file in (GENERATION_CONFIG, "config.json"):
        fields = dict(files.read_json(folder / file)) if (folder / file).is_file() else {}
        named = fields.get("eos_token_id", fields.get("text_config", {}).get("eos_token_id"))
        if named is not None:
            break
    is_default = fields.get("_from_model_config", False) and not isinstance(named, list)
    return file, _as_list(named), file != GENERATION_CONFIG or is_default


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What ends an answer in the chat template; None where there is no template, or one that does not render it."""
    with contextlib.suppress(UserError):
        return Template(tokenizer).end_of_turn
    return None


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
