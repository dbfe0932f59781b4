"""TRL's configurations (`trl sft --config`, `trl dpo --config`), and the alignment-handbook's, which has its keys."""

import re
from collections.abc import Mapping
from typing import Any

from cordee import peek
from cordee.errors import UserError
from cordee.importing import common
from cordee.importing.draft import Draft, is_off
from cordee.importing.trl_keys import LORA, METHODS, OLD, TABLES

NAME = "TRL"
DATA = ("dataset_name", "dataset_id_or_path", "datasets", "dataset_mixture", "dataset_mixer")
__all__ = ["NAME", "TABLES", "is_one", "translate"]


def is_one(given: Mapping[str, Any]) -> bool:
    """Whether a file is TRL's or the alignment-handbook's."""
    names = given.keys() & (common.trainer_fields("sft") | common.trainer_fields("dpo"))
    return "model_name_or_path" in given and (not given.keys().isdisjoint(DATA) or len(names) > 1)


def translate(draft: Draft, processes: int) -> None:
    """Fill the draft.

    Raises:
        UserError: the method is not here.
    """
    if {"dataset_mixture", "dataset_mixer"} & draft.given.keys():
        draft.peer = "alignment-handbook"
    draft.stage = _method(draft)
    common.model(draft, "model_name_or_path", "model_revision", "")
    draft.seed = draft.get("seed", 42)
    draft.came("seed", "seed")
    common.batch(draft, "per_device_train_batch_size", "gradient_accumulation_steps", processes, (8, 1))
    common.optimizer(draft, "optim")
    common.schedule(draft, "lr_scheduler_type", "lr_scheduler_kwargs")
    common.warmup(draft, "warmup_steps", "warmup_ratio")
    _precision(draft)
    _adapter(draft)
    _length(draft)
    _losses(draft)
    names = {**{name: f"trainer.{name}" for name in common.trainer_fields(draft.stage)}, **OLD[draft.stage]}
    settled = {*draft.taken, *draft.lost, "bf16", "fp16", "logging_steps"}
    passed = {theirs: ours for theirs, ours in names.items() if theirs not in settled and not _is_idle(theirs)}
    common.copy(draft, passed)
    common.copy(draft, {"logging_steps": "logging_steps"} if isinstance(draft.get("logging_steps"), int) else {})
    _data(draft)
    common.template(draft, "chat_template", {})
    common.template(draft, "chat_template_path", {})
    common.end_of_turn(draft, "eos_token")
    steps = draft.get("save_steps")
    if isinstance(steps, int) and steps and draft.get("save_strategy", "steps") == "steps":
        draft.take("resume_steps", steps, "save_steps")


def _is_idle(name: str) -> bool:
    return any(re.fullmatch(pattern.replace("*", ".*"), name) for pattern in TABLES.idle)


def _method(draft: Draft) -> Any:
    """Which stage it is: the keys tell it, or the name of the file or of its folder.

    Raises:
        UserError: it is none that is here.
    """
    for key, method in METHODS.items():
        if draft.get(key) is not None:
            problem = f"trains by {method}, which is not here"
            raise UserError(problem, file=draft.file, key=key, hint="SFT and DPO are")
    words = re.findall(r"[a-z]+", f"{draft.file.parent.name} {draft.file.stem}".lower())
    for word in words:
        if word in ("orpo", "kto", "grpo", "rloo", "cpo", "reward", "gkd", "ppo", "xpo", "prm"):
            problem = f"trains by {word.upper()}, as its name says, which is not here"
            raise UserError(problem, file=draft.file, hint="SFT and DPO are; rename the file if it is one of them")
    own = peek.dataclass_fields("trl.DPOConfig").keys() - peek.dataclass_fields("trl.SFTConfig").keys()
    own |= OLD["dpo"].keys() - OLD["sft"].keys() | {"max_prompt_length", "rpo_alpha", "ref_model_init_kwargs"}
    told = sorted(own & draft.given.keys() - {"dataset_num_proc"})
    splits = [str(draft.get(f"{path}.split", "")) for path in draft.under("dataset_mixture.datasets")]
    if told or "dpo" in words or any("pref" in split for split in splits):
        by = f"its key {told[0]}" if told else "its name or the names of its splits"
        draft.by = f"by {by}"
        return "dpo"
    draft.by = "since no key belongs to another method"
    return "sft"


def _precision(draft: Draft) -> None:
    """What is computed in, and what the weights are stored in."""
    if draft.is_on("bf16"):
        draft.take("precision", "bfloat16", "bf16")
    elif draft.is_on("fp16"):
        draft.take("trainer.fp16", True, "fp16")
    elif draft.get("bf16") is False:
        draft.take("precision", "float32", "bf16")
    for key in ("bf16", "fp16"):
        draft.skip(key, "switched off, or the other counts")
    for key in ("dtype", "torch_dtype"):
        if (kind := draft.get(key)) is not None:
            draft.take("trainer.model_init_kwargs.dtype", kind, key)
    given = draft.get("model_init_kwargs", {})
    for name, value in given.items():
        ours = "trainer.model_init_kwargs.dtype" if name in ("dtype", "torch_dtype") else ""
        draft.take(ours or f"trainer.model_init_kwargs.{name}", value, f"model_init_kwargs.{name}")


def _adapter(draft: Draft) -> None:
    """LoRA and quantization, with TRL's defaults, which are not PEFT's."""
    if not draft.is_on("use_peft"):
        for name in ("use_peft", *LORA):
            draft.skip(name, "there is no adapter")
        return
    draft.came("lora", "use_peft")
    for name, value in {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": None}.items():
        draft.take(f"lora.{name}", value)
    draft.remarks["lora.target_modules"] += ": those that PEFT names for the model"
    common.copy(draft, LORA)
    targets = draft.keys["lora.target_modules"]
    if isinstance(targets, list) and targets == ["all-linear"]:
        draft.keys["lora.target_modules"] = "all-linear"
    if draft.stage == "dpo" and draft.get("disable_dropout", True):
        del draft.keys["lora.lora_dropout"]
        draft.taken.pop("lora_dropout", None)
        draft.skip("lora_dropout", "TRL switches every dropout off in DPO")
    for bits in ("4", "8"):
        if draft.is_on(f"load_in_{bits}bit"):
            draft.take(f"quantization.load_in_{bits}bit", True, f"load_in_{bits}bit")
    if draft.is_on("load_in_4bit"):
        draft.take("quantization.bnb_4bit_quant_type", draft.get("bnb_4bit_quant_type", "nf4"), "bnb_4bit_quant_type")
        double = draft.get("use_bnb_nested_quant", False)
        draft.take("quantization.bnb_4bit_use_double_quant", double, "use_bnb_nested_quant")
        kind = draft.keys.get("trainer.model_init_kwargs.dtype")
        draft.take("quantization.bnb_4bit_compute_dtype", kind if kind in ("float16", "float32") else "bfloat16")


def _length(draft: Draft) -> None:
    """The longest row, and what becomes of longer ones."""
    unlimited = "max_length" in draft.given and draft.given["max_length"] is None
    if unlimited:
        draft.take("overlong", "error", remark="TRL sets no limit: raise trainer.max_length (1024) if a row is longer")
        draft.idle["max_length"] = "null sets no limit; see `overlong`"
    else:
        draft.take("overlong", "cut", remark="TRL cuts rows at max_length")


def _losses(draft: Draft) -> None:
    """Which tokens carry loss, and how rows are packed."""
    if draft.stage == "dpo":
        if isinstance(kind := draft.get("loss_type"), str):
            draft.take("trainer.loss_type", [kind], "loss_type")
        return
    if draft.is_on("assistant_only_loss"):
        draft.came("uses", "assistant_only_loss")
    elif draft.get("assistant_only_loss") is None:
        draft.beside.append("every token of `messages` carries loss; here the answers (assistant_only_loss: true)")
    if draft.is_on("completion_only_loss"):
        draft.came("uses", "completion_only_loss")
    if draft.get("packing_strategy") in ("bfd", "ffd"):
        draft.came("trainer.packing", "packing_strategy")


def _data(draft: Draft) -> None:
    """The data sets, and what is held out."""
    column = draft.get("dataset_text_field")
    columns = {column: "text"} if column else {}
    for path in draft.under("dataset_mixture.datasets") or draft.under("datasets"):
        _source(draft, path, columns)
    if draft.data:
        for key in ("dataset_name", "dataset_config", "dataset_train_split"):
            draft.skip(key, "the list of data sets counts")
    elif isinstance(mixer := draft.get("dataset_mixer"), dict):
        draft.came("data", "dataset_mixer", "dataset_splits")
        splits = [split for split in draft.get("dataset_splits", ["train"]) if "test" not in split]
        draft.data = [
            {"path": common.place(name, of=common.DATA), "split": split, **({"weight": share} if share != 1 else {})}
            for name, share in mixer.items()
            for split in splits
        ]
        tests = [split for split in draft.get("dataset_splits", []) if "test" in split]
        if tests and _evaluates(draft):
            draft.take(
                "heldout",
                [{"path": common.place(name, of=common.DATA), "split": tests[0]} for name in mixer],
                "dataset_splits",
            )
    elif name := draft.get("dataset_name", draft.get("dataset_id_or_path")):
        several = draft.get("dataset_configs", [])
        told = {"split": "dataset_train_split", "subset": "dataset_configs.0" if several else "dataset_config"}
        draft.data = [common.source(draft, "data.0", common.place(name, of=common.DATA), told, columns)]
        draft.came("data.0.path", "dataset_name", "dataset_id_or_path")
        if _evaluates(draft):
            held = {"path": draft.data[0]["path"], "split": draft.get("dataset_test_split", "test")}
            held |= {key: draft.data[0][key] for key in ("subset", "columns") if key in draft.data[0]}
            draft.take("heldout", [held], "dataset_test_split", remark="dataset_test_split")
    if len(draft.get("dataset_configs", [])) == 1:
        draft.taken["dataset_configs"] = draft.taken.pop("dataset_configs.0", ["data.0.subset"])
    if column:
        draft.came("data.columns", "dataset_text_field")
    _heldout(draft)


def _evaluates(draft: Draft) -> bool:
    """Whether the peer measures held-out rows during a training."""
    return draft.is_on("eval_strategy") or draft.is_on("evaluation_strategy")


def _heldout(draft: Draft) -> None:
    """What is held out of a mixture, and when it is measured."""
    for key in ("dataset_mixture.test_split_size", "test_split_size"):
        share = common.number(draft.get(key))
        if isinstance(share, float) and 0 < share < 1 and _evaluates(draft):
            draft.take("heldout", share, key)
    if "heldout" in draft.keys:
        draft.came("heldout", "eval_strategy", "evaluation_strategy", "do_eval")
        if isinstance(steps := draft.get("eval_steps"), int):
            draft.take("eval_steps", steps, "eval_steps")


def _source(draft: Draft, path: str, columns: dict[str, str]) -> None:
    """One data set of a mixture."""
    at = f"data.{len(draft.data)}"
    told = {"split": f"{path}.split", "files": f"{path}.data_files"}
    told |= {"subset": f"{path}.config" if draft.get(f"{path}.config") else f"{path}.name"}
    name = "id" if draft.get(f"{path}.id") else "path"
    where = common.files(draft, str(draft.get(f"{path}.{name}", "")), f"{path}.data_files", told)
    found = common.source(draft, at, where, told, columns)
    draft.came(f"{at}.path", f"{path}.{name}")
    weight = draft.get(f"{path}.weight")
    if not is_off(weight):
        found |= {"weight": weight} if weight != 1 else {}
        draft.came(f"{at}.weight", f"{path}.weight")
    draft.data.append(found)
