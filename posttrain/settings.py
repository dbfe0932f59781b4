"""What the stages that train with TRL can all be told, and what of TRL's settings they set themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from cordee import files, model_folder
from cordee.config import Execution, Input, Library, TrainingConfig, require_whole_batches
from cordee.cost import Cost, training_bytes, training_flops

BYTES_PER_TOKEN = 3.0
"""Bytes of a chat in a token, where only a guess is possible: before it is read."""
IGNORED = -100
"""The label of a token without loss."""
OWNED = {
    **dict.fromkeys(
        (
            # where, how often, and who is told: the artifact and its metrics.jsonl
            *("output_dir", "save_strategy", "save_total_limit", "save_only_model", "save_on_each_node"),
            *("logging_strategy", "logging_nan_inf_filter", "log_on_each_node", "disable_tqdm", "report_to"),
            *("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
            *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
            *("hub_revision", "auto_find_batch_size", "average_tokens_across_devices"),
            # resuming and evaluating: the stage's, and other stages'
            *("resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
            *("enable_jit_checkpoint", "do_train", "do_eval", "do_predict", "eval_strategy", "eval_on_start"),
            "load_best_model_at_end",
            # what the data and its masks rest on
            *("remove_unused_columns", "trust_remote_code", "chat_template_path", "eos_token", "pad_token"),
        ),
        "",
    ),
    **dict.fromkeys(("use_cpu", "local_rank", "fsdp", "fsdp_config", "deepspeed"), "launch.config_file"),
    **dict.fromkeys(("parallelism_config", "accelerator_config"), "launch.config_file"),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "the stage's `compile`"),
    **dict.fromkeys(("seed", "data_seed"), "the recipe's `seed`"),
    "full_determinism": "the stage's `deterministic`",
    "gradient_accumulation_steps": "the stage's `global_batch_size`",
    "per_device_train_batch_size": "the stage's `per_device_train_batch_size`",
    "logging_steps": "the stage's `logging_steps`",
    "save_steps": "the stage's `save_steps` for models, `resume_steps` for resume points",
}
"""Fields of `transformers.TrainingArguments` and of TRL's configs that no recipe sets under `trainer:`, each with the
key to write instead."""
LORA_OWNED = dict.fromkeys(
    (
        *("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"),
        *("base_model_name_or_path", "revision", "runtime_config"),
    ),
    "",
)
"""Fields of `peft.LoraConfig` that no recipe sets under `lora:`."""


class TrlConfig(TrainingConfig):
    """Base of the stages that train with a trainer of TRL."""

    model: Input
    """The model to start from: a Hugging Face directory (`$base`)."""
    global_batch_size: int = Field(default=32, ge=1)
    """Rows in one optimizer step, over all processes and accumulation steps; at least 1."""
    per_device_train_batch_size: Execution[int] = Field(default=8, ge=1)
    """Rows that one process works on at once; divides the global batch, and the result does not depend on it."""
    logging_steps: Execution[int] = Field(default=1, ge=1)
    """Optimizer steps from one line of `metrics.jsonl` to the next; a line speaks of its own step, not of a mean."""
    lora: Annotated[dict[str, Any] | None, Library("peft.LoraConfig", owned=LORA_OWNED)] = None
    """PEFT's own settings of the adapter (`r`, `lora_alpha`, `target_modules`, …); none: all weights are trained."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Any field of the library's own config; each stage names the dataclass that checks it."""

    @model_validator(mode="after")
    def _fit_each_other(self) -> "TrlConfig":
        steps = self.trainer.get("max_steps")
        self.require_steps(steps if isinstance(steps, int) and steps > 0 else None)
        require_whole_batches(self.global_batch_size, self.per_device_train_batch_size, self.launch.num_processes)
        return self


def data_cost(file: Path, key: str, given: Mapping[str, Cost], columns: Sequence[str]) -> Cost:
    """Rows and tokens of a file of chats or pairs: what the file's beginning tells, or the stage that will make it.

    Raises:
        UserError: the beginning shows that the file can't be used.
    """
    from cordee.chat.formats import estimate

    if not file.is_file():
        return given.get(key, Cost())
    rows, text_bytes = estimate(file, columns)
    return Cost(rows=rows, tokens=text_bytes / BYTES_PER_TOKEN)


def passes(config: TrlConfig, *, has_reference: bool = False) -> float:
    """Work per token, in units of one forward and backward through all weights (2 + 4 FLOPs a parameter).

    With an adapter the frozen weights need no gradient of their own; a reference adds one forward.
    """
    return (4 / 6 if config.lora is not None else 1.0) + (2 / 6 if has_reference else 0.0)


def training_cost(
    config: TrlConfig, given: Mapping[str, Cost], tokens: float | None, *, has_reference: bool = False
) -> Cost:
    """What training on `tokens` tokens costs.

    Args:
        config: the stage's config.
        given: the costs of its inputs; "model" is the one that matters.
        tokens: tokens over all epochs; None where they are not known yet.
        has_reference: whether a frozen reference model reads each token as well.

    Raises:
        UserError: the model is neither made by a stage nor a model folder.
    """
    base = model_folder.cost(config.model, "model", given)
    cost = Cost(tokens=tokens, parameters=base.parameters, vocab_size=base.vocab_size)
    model_file = Path(config.model) / "config.json"
    if tokens is None or base.parameters is None:
        return cost
    shape: dict[str, Any] = files.read_json(model_file) if model_file.exists() else {}
    layers, width = int(shape.get("num_hidden_layers", 0)), int(shape.get("hidden_size", 0))
    context = int(config.trainer.get("max_length") or 1024)
    at_once = config.per_device_train_batch_size * context
    memory = training_bytes(base.parameters, at_once, layers, width, base.vocab_size or 0)
    if config.lora is not None:
        memory -= 12.0 * base.parameters  # no gradient, no moments
    flops = training_flops(base.parameters, tokens, layers, width, context)
    return replace(cost, flops=passes(config, has_reference=has_reference) * flops, memory_bytes=memory)
