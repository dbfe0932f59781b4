"""Opening and saving Hugging Face model folders: what is not whole is named, and never silently filled in.

`from_pretrained` initialises weights that a checkpoint lacks at random, and warns; here that is an error.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cordee import files, model_folder
from cordee.chat import spans
from cordee.chat.source import Limits
from cordee.compute import probe
from cordee.compute.tokenizer import copy_tokenizer, open_tokenizer, tokenizer_remark
from cordee.errors import Fault, UserError

GENERATION_CONFIG = "generation_config.json"
TRAINERS_FIELDS = ("use_cache", "output_router_logits", "router_aux_loss_coef")
"""What TRL and transformers set in a model's config for the training alone."""


def open_model(
    folder: Path, *, dtype: torch.dtype | None = None, key: str | None = None, kind: Any = AutoModelForCausalLM,
    **options: Any,
) -> PreTrainedModel:  # fmt: skip
    """The causal language model in a folder, on the CPU, in `dtype` (None: the one it is stored in).

    `kind` is the class of transformers that opens it, where it is another model. `options` go to `from_pretrained`,
    such as `attn_implementation`.

    Raises:
        UserError: the folder is no model.
        Fault: it is one, and it is damaged, incomplete or does not fit its own config.
    """
    model_folder.require(folder, key)
    model_folder.require_undamaged(folder)
    attended = attention(folder)
    try:
        model, report = kind.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, in one line with the names
            output_loading_info=True,
            **{**attended, **options},
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise Fault(f"can't be opened as a model: {error}", file=folder) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(what):
            named = sorted(str(name) for name in report[what])
            more = f" and {len(named) - 3} more" if len(named) > 3 else ""
            raise Fault(f"{what.replace('_', ' ')}: {', '.join(named[:3])}{more}", file=folder)
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise Fault(f"{name} holds values that are not finite", file=folder)
    return model


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite; one pass without a copy, a tenth of the time of `torch.isfinite`."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def open_config(folder: Path) -> PreTrainedConfig:
    """The config of the model in a folder, which never runs code of that folder.

    Raises:
        UserError: it needs such code.
        Fault: it is damaged.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        told = files.read_json(folder / "config.json")
        if "auto_map" in told and told.get("model_type") not in CONFIG_MAPPING:
            problem = f"transformers has no model {told.get('model_type')!r}, and code in a model's folder is not run"
            raise UserError(problem, file=folder) from error
        raise Fault(f"can't be opened as a model: {error}", file=folder) from error


def open_shapes(folder: Path) -> PreTrainedModel:
    """The causal language model in a folder without its weights, on torch's meta device: for its tables' sizes.

    Raises:
        Fault: transformers can't make one of its config.
    """
    try:
        config = open_config(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **attention(folder))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise Fault(f"can't be opened as a model: {error}", file=folder) from error


def attention(folder: Path) -> dict[str, str]:
    """What `from_pretrained` has to be told of a model's attention: transformers' sdpa leaves out Gemma 2's softcap."""
    config = open_config(folder).get_text_config()
    return {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}


def save_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: Path,
    base: Path | None = None,
    chats: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a model folder: config, safetensors, generation config, and tokenizer.

    The folder `tokenizer` holds the tokenizer's files, which stay as they are, and `base` (if not given: the same) the
    model that was trained on, whose maker's `generation_config.json` stays. Where it was trained on `chats`, what ends
    an answer ends a generation too. Its config has the fields that trainers set as the base's has them, and says of the
    embedding and the head that they are one only if they are. A folder that is not there yet appears at once; in one
    that is (an artifact's own), `config.json` comes last. `state_dict` replaces the model's own where weights were
    gathered from shards.
    """
    opened = open_tokenizer(tokenizer)
    model.generation_config = GenerationConfig()  # transformers refuses to save some that makers publish
    if _have_parted(model, state_dict):
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    with files.replaced(folder, last="config.json") as beside:
        model.save_pretrained(beside, state_dict=state_dict)
        if base:
            restore_config(beside / "config.json", files.read_json(base / "config.json"))
        files.write_json(beside / GENERATION_CONFIG, _generation_config(base or tokenizer, opened, chats=chats))
        copy_tokenizer(tokenizer, beside)
        probe.write(beside, probe.measure(open_model(beside, dtype=torch.float32), opened(probe.TEXT)["input_ids"]))


def restore_config(file: Path, base: dict[str, Any]) -> None:
    """Write a config with the fields that trainers set as the base's config has them, in nested configs too."""
    config: dict[str, Any] = files.read_json(file)
    nested = [(config[name], own) for name, own in base.items() if isinstance(own, dict) and config.get(name)]
    for written, own in [(config, base), *nested]:
        for name in TRAINERS_FIELDS:
            written.pop(name, None)
            if name in own:
                written[name] = own[name]
    files.write_json(file, config)


def tables_are_one(model: torch.nn.Module) -> bool:
    """Whether a model's embedding and its head share their weights."""
    embedding, head = _tables(model)
    return head is not None and head.data_ptr() == embedding.data_ptr()


def _tables(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights of a model's embedding and of its head, `[vocabulary, width]`; None where it has no head."""
    head = model.get_output_embeddings()
    return model.get_input_embeddings().weight, None if head is None else head.weight


def _have_parted(model: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None) -> bool:
    """Whether the embedding and the head hold different values though the config says that they are one."""
    if not model.config.get_text_config().tie_word_embeddings:
        return False
    given = state_dict or {}
    named = {weights: given.get(name, weights) for name, weights in model.named_parameters(remove_duplicate=False)}
    embedding, head = _tables(model)
    return head is not None and not torch.equal(named[embedding], named[head])


def grow_tables(model: PreTrainedModel, rows: int) -> None:
    """Give the embedding and the head rows for so many tokens, if they have fewer; new ones as transformers draws them.

    They are drawn around the mean of the others, and the same each time.
    """
    if rows <= _tables(model)[0].shape[0]:
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(rows)


def sequence_limits(model: PreTrainedModel, max_length: int | None) -> Limits:
    """How long a sequence and how large a token id may be: of `max_length`, and of the model itself."""
    positions = model_folder.shape(model.config.to_dict()).positions
    return Limits(max_length, positions, model.get_input_embeddings().weight.shape[0])


def stop_token_ids(folder: Path) -> list[int]:
    """The ids that end a generation of the model in a folder, as its `generation_config.json` has them.

    Where that names none: the tokenizer's eos, what its chat template ends an answer with, and the added tokens that
    `config.json` names.
    """
    return _as_list(_generation_config(folder, open_tokenizer(folder)).get("eos_token_id"))


def remarks(folder: Path, tokenizer: Path | None = None) -> list[str]:
    """What a person should know of a model's tokenizer and of the tokens that end its generations, a line each.

    `tokenizer` is the tokenizer's folder, if it is not the model's.
    """
    place = tokenizer or folder
    said = [remark] if (remark := tokenizer_remark(place)) else []
    opened = open_tokenizer(place)
    stops = _as_list(_generation_config(folder, opened).get("eos_token_id"))
    names = {number: token for token, number in opened.get_vocab().items()}
    file, named, _ = _named_stops(folder)
    for number in named:
        if number not in opened.added_tokens_decoder:
            what = f"{names[number]!r}, an ordinary token" if number in names else "which no token has"
            then = "ends every generation" if number in stops else "is taken for a default and not used"
            said.append(f"{file} names {number} as eos_token_id, {what}: it {then}")
    if "strftime_now" in str(opened.chat_template):
        said.append("the chat template writes the day's date: chats have other tokens tomorrow")
    end = spans.end_of_turn(opened)
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
    end_of_turn = spans.end_of_turn(tokenizer)
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
        named = model_folder.token_id(fields, "eos_token_id")
        if named is not None:
            break
    is_default = fields.get("_from_model_config", False) and not isinstance(named, list)
    return file, _as_list(named), file != GENERATION_CONFIG or is_default


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
