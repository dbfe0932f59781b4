"""LLaMA-Factory's configurations (llamafactory/hparams), and its dataset_info.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cordee import files
from cordee.chat.turns import FROM
from cordee.errors import UserError
from cordee.importing import common
from cordee.importing.draft import Draft, is_off
from cordee.importing.llama_factory_keys import COPIED, LOSSES, NOT_HERE, TABLES, TEMPLATES

NAME = "LLaMA-Factory"
INFO = "dataset_info.json"
SFT, PAIRS = {"alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
              "sharegpt": {"messages": "conversations"}}, {"chosen": "chosen", "rejected": "rejected"}  # fmt: skip
__all__ = ["NAME", "TABLES", "is_one", "translate"]


def is_one(given: Mapping[str, Any]) -> bool:
    """Whether a file is LLaMA-Factory's."""
    own = {"stage", "finetuning_type", "cutoff_len", "template", "dataset_dir", "export_dir", "infer_backend"}
    is_next = {"model", "train_dataset"} <= given.keys()
    return ("model_name_or_path" in given and not own.isdisjoint(given)) or is_next


def translate(draft: Draft, processes: int) -> None:
    """Fill the draft.

    Raises:
        UserError: the method is not here, or the file starts no training.
    """
    _method(draft)
    common.model(draft, "model_name_or_path", "model_revision", "adapter_name_or_path")
    draft.seed = draft.get("seed", 42)
    draft.came("seed", "seed")
    common.batch(draft, "per_device_train_batch_size", "gradient_accumulation_steps", processes, (8, 1))
    for ours, value in {"learning_rate": 5e-5, "num_train_epochs": 3, "lr_scheduler_type": "linear"}.items():
        draft.take(f"trainer.{ours}", value)
    draft.take("trainer.max_length", 2048)
    common.copy(draft, COPIED)
    common.optimizer(draft, "optim")
    common.schedule(draft, "lr_scheduler_type", "lr_scheduler_kwargs")
    common.warmup(draft, "warmup_steps", "warmup_ratio")
    draft.take("overlong", "cut", remark="LLaMA-Factory cuts rows at cutoff_len")
    if not draft.is_on("disable_gradient_checkpointing"):
        draft.take("trainer.gradient_checkpointing", True)
    draft.skip("disable_gradient_checkpointing", "memory: no result depends on it")
    _precision(draft)
    _adapter(draft)
    if draft.get("finetuning_type", "lora") == "lora":
        _quantization(draft)
    _packing(draft)
    if draft.stage == "dpo":
        _loss(draft)
    known = _info(draft)
    draft.data = [_source(draft, at, name, known) for at, name in enumerate(_names(draft, "dataset"))]
    draft.came("data", "dataset", "dataset_dir")
    common.template(draft, "template", TEMPLATES)
    if adds := draft.get("add_special_tokens", draft.get("add_tokens")):
        draft.take("added_tokens", [token.strip() for token in adds.split(",")], "add_special_tokens", "add_tokens")
    _heldout(draft, known)
    if isinstance(steps := draft.get("save_steps"), int) and steps:
        draft.take("resume_steps", steps, "save_steps")


def _method(draft: Draft) -> None:
    """Which stage it is."""
    if "model_name_or_path" not in draft.given:
        hint = "its other configurations, with `model_name_or_path` and `stage`, are"
        raise UserError("is a configuration of LLaMA-Factory v1, which is not read", file=draft.file, hint=hint)
    stage, kind = draft.get("stage", "sft"), draft.get("finetuning_type", "lora")
    if stage in NOT_HERE:
        raise UserError(
            f"trains by {NOT_HERE[stage]}, which is not here", file=draft.file, key="stage", hint="SFT and DPO are"
        )
    if draft.get("pref_loss") in ("orpo", "simpo"):
        method = draft.get("pref_loss").upper()
        raise UserError(f"trains by {method}, which is not here", file=draft.file, key="pref_loss", hint="DPO is")
    if kind not in ("lora", "full"):
        problem = f"trains by {kind!r}, which is not here"
        raise UserError(problem, file=draft.file, key="finetuning_type", hint="lora and full are")
    if draft.get("export_dir") or draft.get("infer_backend") or not draft.is_on("do_train"):
        hint = "`posttrain.merge`, `cordee export` and `eval.generate` do what its other commands do"
        if "dataset" not in draft.given or draft.get("do_predict"):
            raise UserError("starts no training", file=draft.file, hint=hint)
    draft.stage = "dpo" if stage == "dpo" else "sft"
    draft.came("uses", "stage")
    draft.skip("do_train", "a recipe trains")
    if stage == "pt":
        draft.holds_texts = True
        draft.beside.append("texts are joined and divided at `cutoff_len`; here each is a row, and its rest is cut off")


def _precision(draft: Draft) -> None:
    """What is computed in, and what the weights are stored in."""
    key = next((key for key in ("pure_bf16", "bf16", "fp16") if draft.is_on(key)), None)
    if key in ("bf16", "pure_bf16"):
        draft.take("precision", "bfloat16", key)
        if key == "pure_bf16" or draft.get("finetuning_type", "lora") == "lora":
            remark = f"{key}: of weights that are not trained" if key == "bf16" else ""
            draft.take("trainer.model_init_kwargs.dtype", "bfloat16", key, remark=remark)
    elif key:
        draft.take("trainer.fp16", True, key)
    else:
        draft.take("precision", "auto")
        draft.beside.append("without `bf16` or `fp16` it computes in the dtype that the model's config names")
    for other in ("pure_bf16", "bf16", "fp16"):
        draft.skip(other, "switched off, or another of these counts")


def _adapter(draft: Draft) -> None:
    """LoRA and quantization."""
    names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora", "use_dora")
    draft.came("lora", "finetuning_type")
    if draft.get("finetuning_type", "lora") != "lora":
        for name in names:
            draft.skip(name, "there is no adapter")
        return
    if draft.get("adapter_name_or_path") and not draft.is_on("create_new_adapter"):
        for name in names:
            draft.skip(name, "the adapter that is trained on has its own")
        if draft.stage == "dpo":
            draft.beside.append("the reference is the model without the adapter; here it is the adapter as it was")
        return
    _new_adapter(draft)


def _new_adapter(draft: Draft) -> None:
    """The settings of an adapter, with LLaMA-Factory's defaults."""
    rank = draft.get("lora_rank", 8)
    draft.take("lora.r", rank, "lora_rank")
    draft.take("lora.lora_alpha", draft.get("lora_alpha", 2 * rank), "lora_alpha")
    target = str(draft.get("lora_target", "all"))
    modules = "all-linear" if target == "all" else [name.strip() for name in target.split(",")]
    draft.take("lora.target_modules", modules, "lora_target")
    if more := draft.get("additional_target"):
        draft.take("lora.modules_to_save", [name.strip() for name in more.split(",")], "additional_target")
    if draft.is_on("pissa_init"):
        draft.take("lora.init_lora_weights", "pissa", "pissa_init")
    common.copy(draft, {"use_rslora": "lora.use_rslora", "use_dora": "lora.use_dora"})
    if draft.stage == "dpo":
        draft.skip("lora_dropout", "every dropout is switched off in DPO")
    elif draft.is_on("lora_dropout"):
        draft.take("lora.lora_dropout", draft.get("lora_dropout"), "lora_dropout")
    if draft.is_on("create_new_adapter") and draft.get("adapter_name_or_path"):
        draft.take("adapter", "new", "create_new_adapter")


def _quantization(draft: Draft) -> None:
    """The weights under an adapter."""
    bits = draft.get("quantization_bit")
    if bits in (4, 8) and draft.get("quantization_method", "bnb") in ("bnb", "bitsandbytes"):
        draft.take(f"quantization.load_in_{bits}bit", True, "quantization_bit")
        draft.came("quantization", "quantization_method")
        if bits == 4:
            draft.take("quantization.bnb_4bit_quant_type", draft.get("quantization_type", "nf4"), "quantization_type")
            double = draft.get("double_quantization", True)
            draft.take("quantization.bnb_4bit_use_double_quant", double, "double_quantization")
            draft.take("quantization.bnb_4bit_compute_dtype", "bfloat16")


def _packing(draft: Draft) -> None:
    """Whether several rows stand in one sequence."""
    asked = draft.get("packing", draft.holds_texts)
    if draft.stage == "sft" and (asked or draft.is_on("neat_packing")):
        draft.take("trainer.packing", True, "packing", "neat_packing")
        if not draft.is_on("neat_packing"):
            draft.beside.append(
                "rows that are packed see those before them; here they never do, as with `neat_packing`"
            )
    for key in ("packing", "neat_packing"):
        draft.skip(key, "switched off, as it is here without the key")


def _loss(draft: Draft) -> None:
    """The loss of DPO."""
    draft.take("trainer.beta", draft.get("pref_beta", 0.1), "pref_beta")
    asked = draft.get("pref_loss", "sigmoid")
    if asked in LOSSES:
        draft.take("trainer.loss_type", [LOSSES[asked]], "pref_loss")
    common.copy(draft, {"ld_alpha": "trainer.ld_alpha"})


def _names(draft: Draft, key: str) -> list[str]:
    asked = draft.get(key, "")
    return [name.strip() for name in (asked if isinstance(asked, list) else str(asked).split(",")) if name.strip()]


def _info(draft: Draft) -> dict[str, Any]:
    """What dataset_info.json says, and in which folder it stands, as `""`; empty where it is not found."""
    folder = str(draft.get("dataset_dir", "data"))
    for place in (Path(folder), draft.file.parent / folder, draft.file.parent):
        if (place / INFO).is_file():
            found = files.read_json(place / INFO)
            return {**found, "": place} if isinstance(found, dict) else {}
    where = "beside the file" if "dataset_dir" not in draft.given else f"in {folder} or beside the file"
    if folder != "ONLINE":
        draft.beside.append(f"no {INFO} {where}: names of data sets stand as they are; write the files that they mean")
    return {}


def _source(draft: Draft, at: int, name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """One data set, by what dataset_info.json says of it."""
    entry = known.get(name, {})
    if known and name not in known:
        draft.beside.append(f"{INFO} has no data set {name!r}: write its file")
    if "hf_hub_url" in entry:
        path = f"{common.DATA}{entry['hf_hub_url']}"
    elif "file_name" in entry:
        path = str(known[""] / entry["file_name"])
    elif draft.get("dataset_dir") == "ONLINE":
        path = common.place(name, of=common.DATA)
    else:
        path = str(next((entry[key] for key in ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
                         if key in entry), name))  # fmt: skip
        if entry:
            draft.beside.append(f"{name!r} is {path!r}, which can't be read from here: write its file")
    found: dict[str, Any] = {"path": path}
    found |= {ours: entry[theirs] for ours, theirs in (("split", "split"), ("subset", "subset")) if theirs in entry}
    if rows := entry.get("num_samples"):
        found |= {"limit": rows, "shuffle": True}
    if most := draft.get("max_samples"):
        found["limit"] = min(most, found.get("limit", most))
        draft.came(f"data.{at}.limit", "max_samples")
    columns = _columns(draft, name, entry)
    return found | ({"columns": columns} if columns else {})


def _columns(draft: Draft, name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """The columns to rename."""
    shape, told = str(entry.get("formatting", "alpaca")), dict(entry.get("columns", {}))
    meant = {**SFT.get(shape, SFT["sharegpt"]), **PAIRS, "system": "system", "tools": "tools"}
    if draft.stage == "dpo" and entry:
        meant |= {"prompt": "prompt", "messages": "prompt"}
        told = {"alpaca": {"prompt": "instruction"}, "sharegpt": {"messages": "conversations"}}.get(shape, {}) | told
        if told.get("query"):
            draft.beside.append(f"{name}: the column {told['query']!r} follows the prompt; here it is left out")
    elif draft.holds_texts:
        meant["prompt"] = "text"
    tags = entry.get("tags", {})
    pair = (tags.get("role_tag", "from"), tags.get("content_tag", "value"))
    roles = {tags.get(f"{role}_tag", role): role for role in ("user", "assistant")}
    if pair not in (("from", "value"), ("role", "content")) or any(
        said != role and FROM.get(str(said).lower()) != role for said, role in roles.items()
    ):
        draft.beside.append(f"{name}: messages have keys or roles of their own (tags); `role` and `content` are read")
    for media in {"images", "videos", "audios"} & told.keys():
        draft.beside.append(f"{name}: has {media}; text alone is trained on")
    columns = {old: meant[new] for new, old in told.items() if new in meant and old != meant[new]}
    return {old: new for old, new in columns.items() if (old, new) != ("messages", "conversations")}


def _heldout(draft: Draft, known: Mapping[str, Any]) -> None:
    """What is held out, and when it is measured."""
    share = common.number(draft.get("val_size"))
    if names := _names(draft, "eval_dataset"):
        kept = {**draft.taken}
        draft.take("heldout", [_source(draft, 0, name, known) for name in names], "eval_dataset")
        draft.taken = kept | {"eval_dataset": ["heldout"]}
    elif isinstance(share, float) and 0 < share < 1:
        draft.take("heldout", share, "val_size")
    elif not is_off(share):
        draft.lose("val_size", "a number of rows: `heldout` is a share of them, or files")
    if isinstance(steps := draft.get("eval_steps"), int) and "heldout" in draft.keys:
        draft.take("eval_steps", steps, "eval_steps")
