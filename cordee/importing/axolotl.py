"""axolotl's configurations."""

from collections.abc import Mapping
from typing import Any

from cordee.errors import UserError
from cordee.importing import common
from cordee.importing.axolotl_data import source
from cordee.importing.axolotl_keys import COPIED, DPO, LORA, NOT_HERE, TABLES, TEMPLATES
from cordee.importing.draft import Draft, is_off

NAME = "axolotl"


def is_one(given: Mapping[str, Any]) -> bool:
    """Whether a file is axolotl's."""
    return "base_model" in given


def translate(draft: Draft, processes: int) -> None:
    """Fill the draft.

    Raises:
        UserError: the method is not here.
    """
    _method(draft)
    common.model(draft, "base_model", "revision_of_model", "lora_model_dir")
    draft.seed = draft.get("seed", 42)
    draft.came("seed", "seed")
    _batch(draft, processes)
    draft.take("trainer.num_train_epochs", 1)
    draft.take("trainer.max_length", 512)
    if draft.stage == "dpo":
        draft.skip("sample_packing", "pairs are not packed")
        draft.take("trainer.beta", 0.1)
    common.copy(draft, COPIED | (DPO if draft.stage == "dpo" else {"sample_packing": "trainer.packing"}))
    _schedule(draft)
    _precision(draft)
    if draft.is_on("gradient_checkpointing"):
        draft.take("trainer.gradient_checkpointing", True, "gradient_checkpointing")
    else:
        draft.skip("gradient_checkpointing", "switched off, as it is here")
    _adapter(draft)
    for at, path in enumerate([*draft.under("datasets"), *draft.under("pretraining_dataset")]):
        draft.data.append(source(draft, f"data.{at}", path))
    _template(draft)
    _heldout(draft)
    common.copy(draft, {"save_steps": "resume_steps"} if isinstance(draft.get("save_steps"), int) else {})
    limits = {"drop": "drop", "truncate": "cut", "raise": "error"}
    asked = limits.get(draft.get("excess_length_strategy", "drop"), "drop")
    draft.take("overlong", "cut" if draft.holds_texts else asked, "excess_length_strategy")
    kernels = ("liger", "cut_cross_entropy", "kernels")
    if all(str(plugin).split(".")[2:3] in [[name] for name in kernels] for plugin in draft.get("plugins", [])):
        draft.skip("plugins", common.KERNELS)


def _batch(draft: Draft, processes: int) -> None:
    """The batch, which an old key gives for one process."""
    rows, each = draft.get("batch_size"), draft.get("micro_batch_size", 1)
    if rows is not None and draft.get("gradient_accumulation_steps") is None and rows % each == 0:
        told = f"batch_size {rows} * {processes} process{'es' if processes > 1 else ''}"
        draft.take("global_batch_size", rows * processes, "batch_size", remark=told)
        draft.take("per_device_train_batch_size", each, "micro_batch_size")
        return
    common.batch(draft, "micro_batch_size", "gradient_accumulation_steps", processes, (1, 1))


def _method(draft: Draft) -> None:
    """Which stage it is."""
    asked = str(draft.get("rl", "sft")).lower()
    for name, method in NOT_HERE.items():
        if asked == name or (name == "diffusion" and draft.get(name)) or (draft.is_on(name) and "model" in name):
            key = "rl" if asked == name else name
            raise UserError(f"trains by {method}, which is not here", file=draft.file, key=key, hint="SFT and DPO are")
    if asked in ("dpo", "ipo"):
        draft.stage = "dpo"
        if asked == "ipo":
            draft.take("trainer.loss_type", ["ipo"], "rl")
        draft.came("uses", "rl")


def _schedule(draft: Draft) -> None:
    """The optimizer, the schedule and the warm-up."""
    draft.take("trainer.optim", "adamw_torch_fused")
    common.optimizer(draft, "optimizer")
    draft.take("trainer.lr_scheduler_type", "cosine")
    common.schedule(draft, "lr_scheduler", "lr_scheduler_kwargs")
    least = draft.get("cosine_min_lr_ratio")
    if (
        least is not None
        and draft.get("lr_scheduler", "cosine") == "cosine"
        and not draft.is_on("cosine_constant_lr_ratio")
    ):
        draft.take("trainer.lr_scheduler_type", "cosine_with_min_lr", "lr_scheduler", "cosine_min_lr_ratio")
        draft.take("trainer.lr_scheduler_kwargs", {"min_lr_rate": least}, "cosine_min_lr_ratio")
    common.warmup(draft, "warmup_steps", "warmup_ratio")
    if draft.get("warmup_steps") is None and draft.get("warmup_ratio") is None:
        draft.take("trainer.warmup_steps", 0.03, remark="axolotl's default: 3% of all steps, at most 100")


def _precision(draft: Draft) -> None:
    """What is computed in, and what the weights are stored in."""
    is_default = draft.given.keys().isdisjoint(("bf16", "bfloat16", "fp16", "float16", "float32"))
    half = "bf16" if is_default else next((key for key in ("bf16", "bfloat16") if draft.is_on(key)), None)
    single = next((key for key in ("fp16", "float16") if draft.is_on(key)), None)
    if half:
        is_told = draft.get(half, "auto") != "auto"
        draft.take("precision", "bfloat16" if is_told else "auto", half)
        if not is_told:
            draft.beside.append(
                "`bf16: auto` stores weights in bfloat16 too; here `model_init_kwargs: {dtype: bfloat16}`"
            )
        if is_told:
            draft.take(
                "trainer.model_init_kwargs.dtype", "bfloat16", half, remark=f"{half}: weights too, as in axolotl"
            )
    elif single:
        draft.take("trainer.fp16", True, single)
    else:
        draft.take("precision", "float32", "bf16", "bfloat16", "fp16", "float16")
    for key in ("bf16", "bfloat16", "fp16", "float16", "float32"):
        draft.skip(key, "switched off, or another of these counts")
    if draft.get("tf32") is True:
        draft.take("trainer.tf32", True, "tf32")
    else:
        draft.skip("tf32", "torch's default")


def _adapter(draft: Draft) -> None:
    """LoRA and quantization."""
    asked = draft.get("adapter")
    if asked not in ("lora", "qlora"):
        draft.lose("adapter", "no adapter of this kind: all weights are trained")
        for path in [*LORA, "lora_target_linear", "lora_target_modules"]:
            draft.skip(path, "there is no adapter")
        return
    draft.came("lora", "adapter")
    if draft.get("lora_model_dir"):
        for path in [*LORA, "lora_target_linear", "lora_target_modules"]:
            draft.skip(path, "the adapter that is trained on has its own")
    else:
        common.copy(draft, LORA)
        _targets(draft)
    dropout = draft.keys.get("lora.lora_dropout")
    if draft.stage == "dpo" and dropout is not None:
        del draft.keys["lora.lora_dropout"], draft.taken["lora_dropout"]
        draft.skip("lora_dropout", "TRL switches every dropout off in DPO")
    for bits in ("4", "8"):
        if draft.is_on(f"load_in_{bits}bit"):
            draft.take(f"quantization.load_in_{bits}bit", True, f"load_in_{bits}bit")
    if draft.is_on("load_in_4bit"):
        settings = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
        for name, value in (settings | draft.get("bnb_config_kwargs", {})).items():
            draft.take(f"quantization.{name}", value, *(["bnb_config_kwargs"] if draft.get(f"bnb_config_kwargs.{name}")
                                                        is not None else []))  # fmt: skip


def _targets(draft: Draft) -> None:
    """The modules that the adapter changes."""
    listed, linear = draft.get("lora_target_modules"), draft.is_on("lora_target_linear")
    if linear:
        draft.take("lora.target_modules", "all-linear", "lora_target_linear")
        draft.skip("lora_target_modules", "`lora_target_linear` covers all linear layers")
    elif not is_off(listed):
        draft.take("lora.target_modules", listed, "lora_target_modules")
    elif draft.get("lora_target_parameters"):
        draft.take("lora.target_modules", [], remark="parameters alone")
    for path in ("lora_target_linear", "lora_target_modules"):
        draft.skip(path, "another key names the modules")


def _template(draft: Draft) -> None:
    """The chat template and the tokens that are added."""
    if jinja := draft.get("chat_template_jinja"):
        common.template(draft, "chat_template_jinja", TEMPLATES, jinja)
        draft.came("chat_template", "chat_template")
    else:
        fallback = str(draft.get("chat_template", "")).removeprefix("tokenizer_default_fallback_")
        common.template(draft, "chat_template", TEMPLATES, fallback or None)
    for at in draft.under("datasets"):
        if draft.get(f"{at}.chat_template") in ("tokenizer_default", draft.get("chat_template")):
            draft.skip(f"{at}.chat_template", "the same as for all")
    _tokens(draft)
    common.end_of_turn(draft, "special_tokens.eos_token")
    draft.skip("special_tokens.pad_token", "no result depends on it; `pad_token` names another")


def _tokens(draft: Draft) -> None:
    """The tokens that are added: those that are listed, and of ChatML's those that are named as special ones."""
    tokens = [*draft.get("tokens")] if isinstance(draft.get("tokens"), list) else []
    paths = ["tokens"] if tokens else []
    for path in ("special_tokens.bos_token", "special_tokens.eos_token"):
        if draft.keys.get("chat_template") == "chatml" and (word := draft.get(path)) in ("<|im_start|>", "<|im_end|>"):
            tokens += [word] if word not in tokens else []
            paths.append(path)
    if tokens:
        draft.take("added_tokens", tokens, *paths)


def _heldout(draft: Draft) -> None:
    """What is held out, and when it is measured."""
    share = common.number(draft.get("val_set_size"))
    if isinstance(share, float) and 0 < share < 1:
        draft.take("heldout", share, "val_set_size")
    elif is_off(share):
        draft.skip("val_set_size", "nothing is held out, as it is here without the key")
    else:
        draft.lose("val_set_size", "a number of rows: `heldout` is a share of them, or files")
    if places := draft.under("test_datasets"):
        kept = draft.holds_texts
        draft.take("heldout", [source(draft, f"heldout.{at}", path) for at, path in enumerate(places)])
        draft.holds_texts = kept
        draft.remarks["heldout"] = "test_datasets"
    if isinstance(steps := draft.get("eval_steps"), int) and steps and "heldout" in draft.keys:
        draft.take("eval_steps", steps, "eval_steps")
    else:
        draft.skip("eval_steps", common.EVALS)


__all__ = ["NAME", "TABLES", "is_one", "translate"]
