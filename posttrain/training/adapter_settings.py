"""The settings of a LoRA adapter, checked so that none is silently without effect.

PEFT takes a list of module names of which one matches, and leaves the others out without a word.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel

from cordee import model_folder
from cordee.compute.model import tables_are_one
from cordee.errors import UserError, nearest


def lora_config(given: Mapping[str, Any], model: PreTrainedModel, new_tokens: Sequence[int] = ()) -> LoraConfig:
    """The adapter's settings, checked against the model; without `target_modules`, all linear layers but the head.

    Args:
        given: the recipe's `lora:`.
        model: the model, whose embedding has a row for each token.
        new_tokens: the ids of tokens that were added: their rows are trained as well.

    Raises:
        UserError: PEFT refuses a value, or a name matches no module.
    """
    given = dict(given) | (_trained_tokens(given, model, new_tokens) if new_tokens else {})
    try:
        task = "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"
        config = LoraConfig(**{"target_modules": "all-linear", **given}, task_type=task)
        # experts that were linear layers in transformers 4 are parameters now: `gate_proj` and `up_proj` are one
        convert_peft_config_for_transformers(config, model, None)
    except (TypeError, ValueError) as error:
        raise UserError(f"peft.LoraConfig refuses it: {error}", key="lora") from error
    names = [name for name, _ in model.named_modules() if name]
    _require_matches(_modules_left(given.get("target_modules"), config), names, "lora.target_modules")
    for field in ("modules_to_save", "exclude_modules", "rank_pattern", "alpha_pattern"):
        _require_matches(given.get(field), names, f"lora.{field}")
    layers, there = config.layers_to_transform, model_folder.shape(model.config.to_dict()).layers
    for layer in [layers] if isinstance(layers, int) else layers or []:
        if there is not None and not 0 <= layer < there:
            problem = f"there is no layer {layer}: the model has {there}, from 0"
            raise UserError(problem, key="lora.layers_to_transform")
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(("pissa_niter", "eva")):
        problem = f"{start!r} draws at random, and is drawn anew when the adapter is opened: it would fit another base"
        raise UserError(problem, key="lora.init_lora_weights", hint="pissa gives the same weights each time")
    _require_tables_kept(config, model, given)
    return config


def require_dropout(lora: Mapping[str, Any] | None, *, is_disabled: bool) -> None:
    """Refuse a dropout of the adapter that would be switched off with the model's.

    Args:
        lora: the recipe's.
        is_disabled: `trainer.disable_dropout`.

    Raises:
        UserError: it would be.
    """
    if lora and lora.get("lora_dropout") and is_disabled:
        problem = (
            "every dropout is switched off, the adapter's too, while trainer.disable_dropout is true (its default)"
        )
        hint = "leave it out, or set trainer.disable_dropout: false"
        raise UserError(problem, key="lora.lora_dropout", hint=hint)


def coverage(model: PeftModel) -> str:
    """Which kinds of weights the adapter changes, by the last words of their names, and which matrices it leaves."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    done = {id(weight) for table in tables if table is not None for weight in table.parameters()}
    covered: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            is_parameter = isinstance(module, ParamWrapper)
            weight = module.get_param() if is_parameter else module.get_base_layer().weight
            covered.append(_kind(f"{name}.{module.parameter_name if is_parameter else 'weight'}"))
            done.add(id(weight))
    left = {
        _kind(name)
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and id(weight) not in done and not weight.requires_grad and "original_module" not in name
    }
    said = f"lora covers {len(covered)} modules: {', '.join(sorted({*covered}))}"
    return said + (f"; not covered: {', '.join(sorted(left - {*covered}))}" if left - {*covered} else "")


def _kind(name: str) -> str:
    """What a weight is called: a layer by its own name, a parameter such as those of experts with its module's."""
    words = [word for word in name.split(".") if word != "base_layer"]
    return words[-2] if words[-1] == "weight" else ".".join(words[-2:])


def _modules_left(wanted: Any, config: LoraConfig) -> Any:
    """The `target_modules` that a recipe names, without those that PEFT has converted to `target_parameters`."""
    left = config.target_modules
    if isinstance(wanted, str):
        return wanted if left == wanted else None
    return [name for name in wanted or [] if name in left]


def _trained_tokens(given: Mapping[str, Any], model: PreTrainedModel, new_tokens: Sequence[int]) -> dict[str, Any]:
    """The settings that have the rows of new tokens trained, in the embedding and in a head of its own."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding] if head is None or tables_are_one(model) else [embedding, head]
    asked = given.get("trainable_token_indices") or {}
    indices = dict(asked) if isinstance(asked, Mapping) else {names[id(embedding)]: list(asked)}
    saved = list(given.get("modules_to_save") or [])
    for table in tables:
        name = names[id(table)]
        if _matches(saved, name):
            continue
        if getattr(table, "bias", None) is not None:  # PEFT's layer of trained tokens leaves it out
            saved.append(name)
            continue
        indices[name] = sorted({*indices.get(name, ()), *new_tokens})
    return {"trainable_token_indices": indices or None, "modules_to_save": saved or None}


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


def _require_tables_kept(config: LoraConfig, model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Refuse to train one of two tables that are one: merged by PEFT, each would change the other (its issue 2368).

    Raises:
        UserError: the embedding and the head are tied, and the adapter changes one of them.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = (names.get(id(table)) for table in (model.get_input_embeddings(), model.get_output_embeddings()))
    saved = [name for name in (embedding, head) if name and _matches(given.get("modules_to_save"), name)]
    over = [name for name in (embedding, head) if name and _matches(given.get("target_modules"), name)]
    if tables_are_one(model) and (saved or over) and not (saved and config.ensure_weight_tying):
        raise UserError(
            f"the model ties its embedding and its head, and the adapter changes {', '.join(saved + over)}: merged, "
            "they would no longer be one",
            key="lora",
            hint="leave them out, or train both: `modules_to_save` with the embedding, and `ensure_weight_tying: true`",
        )


def _matches(wanted: Any, name: str) -> bool:
    """Whether PEFT takes a module for one of those that are wanted."""
    if not wanted or wanted == "all-linear":
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == item or name.endswith(f".{item}") for item in wanted)
