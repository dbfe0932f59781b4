"""torchtune's configurations (recipes/configs): dotted names of builders, with their arguments."""

import re
from collections.abc import Mapping
from typing import Any

from cordee.errors import UserError
from cordee.importing import common
from cordee.importing.draft import Draft, is_off
from cordee.importing.torchtune_keys import DATASETS, NOT_HERE, OPTIMIZERS, TABLES

NAME = "torchtune"
COMPONENT = "_component_"
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_REST = re.compile(r"(?P<name>\w+)\[(?P<percent>\d+)%:\]")
MLP = ["gate_proj", "up_proj", "down_proj"]
SAME_LOSS = ("CEWithChunkedOutputLoss", "LinearCrossEntropyLoss", "CrossEntropyLoss")
__all__ = ["NAME", "TABLES", "is_one", "translate"]


def is_one(given: Mapping[str, Any]) -> bool:
    """Whether a file is torchtune's."""
    return any(isinstance(value, dict) and COMPONENT in value for value in given.values())


def translate(draft: Draft, processes: int) -> None:
    """Fill the draft.

    Raises:
        UserError: the method is not here, or the file starts no training.
    """
    draft.given = _resolved(draft.given, draft)
    _method(draft)
    folder = draft.get("checkpointer.checkpoint_dir", draft.get("base_model_path", ""))
    builder = _name(draft, "model").rpartition(".")[2]
    draft.take(
        "model", folder, "checkpointer.checkpoint_dir", "base_model_path", remark=f"checkpoint_dir, of {builder}"
    )
    draft.came("model", f"model.{COMPONENT}")
    if "Meta" in _name(draft, "checkpointer"):
        draft.lose(f"checkpointer.{COMPONENT}", "reads Meta's own files: give a folder of the hub's format as `model`")
    draft.seed = draft.get("seed", 42)
    draft.came("seed", "seed")
    common.batch(draft, "batch_size", "gradient_accumulation_steps", processes, (1, 1))
    names = {"epochs": "trainer.num_train_epochs", "log_every_n_steps": "logging_steps"}
    common.copy(draft, names)
    _optimizer(draft)
    _adapter(draft, builder)
    kind = {"bf16": "bfloat16", "fp32": "float32"}.get(draft.get("dtype", "bf16"))
    if kind:
        draft.take("precision", kind, "dtype")
        draft.take(
            "trainer.model_init_kwargs.dtype", kind, "dtype", remark=f"dtype {draft.get('dtype', 'bf16')}: weights too"
        )
    if draft.is_on("enable_activation_checkpointing"):
        draft.take("trainer.gradient_checkpointing", True, "enable_activation_checkpointing")
    if draft.get("compile") is not None:
        draft.take("compile", "on" if draft.is_on("compile") else "off", "compile")
    _length(draft)
    for path in draft.under("dataset"):
        draft.data.append(_source(draft, f"data.{len(draft.data)}", path))
    _heldout(draft)


def _resolved(value: Any, draft: Draft) -> Any:
    """Values with `${key}` replaced, as OmegaConf does it."""
    if isinstance(value, dict):
        return {name: _resolved(inner, draft) for name, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, draft) for inner in value]
    if not isinstance(value, str):
        return value
    if whole := _REFERENCE.fullmatch(value):
        return draft.get(whole[1], value)
    return _REFERENCE.sub(lambda found: str(draft.get(found[1], found[0])), value)


def _name(draft: Draft, path: str) -> str:
    return str(draft.get(f"{path}.{COMPONENT}", ""))


def _method(draft: Draft) -> None:
    """Which stage it is."""
    for key, method in NOT_HERE.items():
        if key in draft.given:
            raise UserError(f"trains by {method}, which is not here", file=draft.file, key=key, hint="SFT and DPO are")
    kinds = [_name(draft, path) for path in draft.under("dataset")]
    if "vision" in _name(draft, "model") or any("multimodal" in kind for kind in kinds):
        raise UserError("trains on images, and text alone is trained on", file=draft.file, key="model")
    if "dataset" not in draft.given or "optimizer" not in draft.given:
        hint = "`eval.benchmark`, `eval.generate` and `posttrain.merge` do what its other recipes do"
        raise UserError("starts no training", file=draft.file, hint=hint)
    loss = _name(draft, "loss").rpartition(".")[2]
    if loss in ("DPOLoss", "RSOLoss"):
        draft.stage = "dpo"
        draft.take("trainer.loss_type", ["sigmoid" if loss == "DPOLoss" else "hinge"], f"loss.{COMPONENT}")
        name = "loss.beta" if loss == "DPOLoss" else "loss.gamma"
        draft.take("trainer.beta", draft.get(name, 0.1), name)
    elif loss in SAME_LOSS:
        draft.skip("loss", "cross entropy, as it is here; in chunks for memory")


def _optimizer(draft: Draft) -> None:
    """The optimizer with torch's defaults, clipping, and the schedule: constant without one."""
    name = _name(draft, "optimizer")
    ours = OPTIMIZERS.get(name)
    if ours:
        fused = ours == "adamw_torch" and draft.is_on("optimizer.fused")
        draft.take("trainer.optim", "adamw_torch_fused" if fused else ours, f"optimizer.{COMPONENT}", "optimizer.fused")
    else:
        draft.lose(f"optimizer.{COMPONENT}", "transformers has no such optimizer: AdamW is used")
    draft.skip("optimizer.fused", common.KERNELS)
    common.copy(draft, {"optimizer.lr": "trainer.learning_rate"})
    draft.take("trainer.weight_decay", draft.get("optimizer.weight_decay", 0.0 if ours in ("sgd", "adagrad") else 0.01),
               "optimizer.weight_decay", remark="" if draft.get("optimizer.weight_decay") is not None
               else "the default of torch's optimizer")  # fmt: skip
    for at, beta in enumerate(draft.get("optimizer.betas", [])):
        draft.take(f"trainer.adam_beta{at + 1}", beta, "optimizer.betas")
    common.copy(draft, {"optimizer.eps": "trainer.adam_epsilon"})
    clip = draft.get("clip_grad_norm")
    most = common.number(clip) if not is_off(clip) else 0
    draft.take("trainer.max_grad_norm", most, "clip_grad_norm", remark="" if most else "torchtune clips no gradient")
    draft.take("trainer.lr_scheduler_type", "constant", remark="torchtune's, where there is no lr_scheduler")
    schedule = _name(draft, "lr_scheduler").rpartition(".")[2]
    if schedule == "get_cosine_schedule_with_warmup":
        draft.take("trainer.lr_scheduler_type", "cosine", f"lr_scheduler.{COMPONENT}")
        common.copy(draft, {"lr_scheduler.num_warmup_steps": "trainer.warmup_steps"})
        if (cycles := draft.get("lr_scheduler.num_cycles")) is not None:
            draft.take("trainer.lr_scheduler_kwargs", {"num_cycles": cycles}, "lr_scheduler.num_cycles")


def _adapter(draft: Draft, builder: str) -> None:
    """LoRA and quantization."""
    if not re.match(r"q?(lora|dora)_", builder):
        return
    draft.take("lora.r", draft.get("model.lora_rank", 8), "model.lora_rank")
    draft.take("lora.lora_alpha", draft.get("model.lora_alpha", 16), "model.lora_alpha")
    modules = [{"output_proj": "o_proj"}.get(name, name) for name in draft.get("model.lora_attn_modules", [])]
    modules += MLP if draft.is_on("model.apply_lora_to_mlp") else []
    modules += ["lm_head"] if draft.is_on("model.apply_lora_to_output") else []
    paths = [f"model.{name}" for name in ("lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output")]
    if builder.partition("_")[2].startswith(("phi3", "phi4")):
        draft.take("lora.target_modules", "all-linear", remark="the hub's Phi has q, k and v in one matrix")
        for path in paths:
            draft.lose(path, "the hub's Phi has q, k and v, and gate and up, in one matrix each: all-linear is taken")
    else:
        draft.take("lora.target_modules", modules, *paths)
    if (rate := draft.get("model.lora_dropout")) and draft.stage == "sft":
        draft.take("lora.lora_dropout", rate, "model.lora_dropout")
    elif rate:
        draft.take("lora.lora_dropout", rate, "model.lora_dropout")
        draft.take("trainer.disable_dropout", False, remark="torchtune leaves dropout on in DPO")
    draft.skip("model.lora_dropout", "no dropout, as it is here without the key")
    if draft.is_on("model.use_dora") or "dora_" in builder:
        draft.take("lora.use_dora", True, "model.use_dora")
    if draft.is_on("model.quantize_base") or builder.startswith("q"):
        draft.take("quantization.load_in_4bit", True, "model.quantize_base", remark=builder)
        for name, value in {"quant_type": "nf4", "use_double_quant": True, "compute_dtype": "bfloat16"}.items():
            draft.take(f"quantization.bnb_4bit_{name}", value, remark="as torchtune's NF4")


def _length(draft: Draft) -> None:
    """The longest row."""
    if longest := draft.get("tokenizer.max_seq_len"):
        draft.take("trainer.max_length", longest, "tokenizer.max_seq_len")
        draft.take("overlong", "cut", remark="torchtune cuts rows at max_seq_len")
    else:
        draft.take("trainer.max_length", 4096, remark="torchtune sets no limit (max_seq_len: null)")
        draft.take("overlong", "error", remark="so that no row is cut: raise max_length if one is longer")


def _heldout(draft: Draft) -> None:
    """What is held out: a split of its own, or the rest of the split that is trained on."""
    if not draft.under("dataset_val"):
        return
    split = str(draft.get("dataset_val.split", "train"))
    rest = _REST.fullmatch(split)
    if rest and draft.get("dataset.split") == f"{rest['name']}[:{rest['percent']}%]":
        share = 1 - int(rest["percent"]) / 100
        draft.lost.pop("dataset.split")
        draft.came("data.0.split", "dataset.split")
        draft.take("heldout", round(share, 2), "dataset_val", remark="drawn at random, and not the last rows")
    elif "[" in split:
        draft.lose("dataset_val", "a part of a split: `heldout` is a share of the rows, or files")
    else:
        draft.take("heldout", [_source(draft, "heldout.0", "dataset_val")], remark="dataset_val")
    if "heldout" in draft.keys and (steps := draft.get("run_val_every_n_steps")):
        draft.take("eval_steps", steps, "run_val_every_n_steps")


def _source(draft: Draft, at: str, path: str) -> dict[str, Any]:
    """One data set, by the name of its builder."""
    name = _name(draft, path).rpartition(".")[2]
    known = DATASETS.get(name)
    if known is None:
        draft.lose(f"{path}.{COMPONENT}", "no data set of this name is known: write its `path` and `columns`")
    else:
        draft.came(f"{at}.path", f"{path}.{COMPONENT}")
    default, columns, shape = known or ("", {}, "")
    told = {"split": f"{path}.split", "files": f"{path}.data_files",
            "subset": f"{path}.name" if draft.get(f"{path}.name") else f"{path}.subset"}  # fmt: skip
    where = common.files(draft, str(draft.get(f"{path}.source", default)), f"{path}.data_files", told)
    draft.came(f"{at}.path", f"{path}.source")
    if mapped := draft.get(f"{path}.column_map"):
        ours = {"input": "prompt", "output": "completion"} if shape == "instruct" else {}
        columns = {old: ours.get(new, new) for new, old in mapped.items()}
        draft.came(f"{at}.columns", f"{path}.column_map")
    for key, new in (("conversation_column", "conversations"), ("column", "text")):
        if column := draft.get(f"{path}.{key}"):
            columns = {} if column == "messages" else {column: new}
            draft.came(f"{at}.columns", f"{path}.{key}")
    if draft.get(f"{path}.conversation_style") in ("sharegpt", "openai"):
        draft.came(at, f"{path}.conversation_style")
    if shape == "text":
        draft.holds_texts = draft.holds_texts or at.startswith("data")
    elif shape == "alpaca":
        draft.beside.append("alpaca_dataset writes Alpaca's text around an instruction; here it is a turn as it stands")
        if draft.get(f"{path}.train_on_input") is None:
            draft.beside.append("alpaca_dataset puts loss on prompts too (train_on_input); here on answers alone")
    if at.startswith("data") and draft.is_on(f"{path}.packed"):
        draft.take("trainer.packing", True, f"{path}.packed")
        draft.beside.append("rows are packed in the order in which they come; here by best fit")
    return common.source(draft, at, where or name, told, columns)
