"""What the stages that train with TRL can all be told, and what of TRL's settings they set themselves."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cordee import model_folder
from cordee.chat.named import ChatTemplate
from cordee.chat.source import BadRows, EarlierAnswers, Overlong, Source
from cordee.config import Execution, Input, Library, Precision, TrainingConfig, require_whole_batches
from cordee.errors import UserError
from cordee.model_folder import ModelInput

MAX_LENGTH, EPOCHS = 1024, 3.0
"""TRL's defaults of `max_length` and `num_train_epochs`."""
IGNORED = -100
"""The label of a token without loss."""
CHECKED_BATCHES = 64
"""Batches of the trainer's own collator that are compared with the data before the first step."""
OWNED = {
    **dict.fromkeys(
        (
            # where, how often, and who is told: the artifact and its metrics.jsonl
            *("output_dir", "save_only_model", "save_on_each_node"),
            *("logging_strategy", "logging_nan_inf_filter", "log_on_each_node", "disable_tqdm"),
            *("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
            *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
            *("hub_revision", "auto_find_batch_size", "average_tokens_across_devices"),
            # resuming and evaluating: the stage's, and other stages'
            *("resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
            *("enable_jit_checkpoint", "do_train", "do_predict", "load_best_model_at_end"),
            # what the data and its masks rest on
            *("remove_unused_columns", "trust_remote_code"),
        ),
        "",
    ),
    "pad_token": "the stage's `pad_token`",
    "report_to": "the stage's `report_to`",
    "chat_template_path": "the stage's `chat_template`",
    "eos_token": "the end of an answer into the stage's `chat_template`: what ends one there ends a generation too",
    **dict.fromkeys(("do_eval", "eval_strategy", "eval_steps", "eval_on_start", "eval_delay"), "the stage's `heldout`"),
    **dict.fromkeys(("save_strategy", "save_total_limit"), "`save_steps` and `resume_steps` of the stage"),
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
PREFERENCE_OWNED = OWNED | {
    # always done: the reference's log-probabilities are computed once, and a step's figures are told at each
    **dict.fromkeys(("precompute_ref_log_probs", "precompute_ref_batch_size", "logging_first_step"), ""),
    # a reference that is moved during the training is no part of a resume point
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), ""),
    **dict.fromkeys(("padding_free", "dataset_num_proc", "is_encoder_decoder", "label_smoothing_factor"), ""),
    **dict.fromkeys(("truncation_mode", "max_completion_length"), "the stage's `overlong`"),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "`model_init_kwargs: {use_kernels: true}`"),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_accumulation_steps", "prediction_loss_only"), ""),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics", "label_names"), ""),
    **dict.fromkeys(("batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "length_column_name"), ""),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), ""),
    "generate_during_eval": "a stage `eval.generate` on its checkpoints",
    "padding_value": "the stage's `pad_token`",
}
"""Besides, of the configs of methods that learn from given answers."""
SFT_OWNED = {
    **OWNED,
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss", "dataset_kwargs", "dataset_num_proc"), ""),
    **dict.fromkeys(("packing_strategy", "padding_free", "eval_packing"), ""),
    "dataset_text_field": "`columns: {yours: text}` beside the file's path",
    "truncation_mode": "the stage's `overlong`",
}
"""Besides, of `trl.SFTConfig`: what is trained on, and how chats are packed whole (best-fit decreasing)."""
LORA_OWNED = dict.fromkeys(
    (
        *("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"),
        *("base_model_name_or_path", "revision", "runtime_config"),
    ),
    "",
)
"""Fields of `peft.LoraConfig` that no recipe sets under `lora:`."""

FOLLOW_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")
"""Schedules that `Trainer` steps only where it evaluates."""


class TrlConfig(TrainingConfig):
    """Base of the stages that train with a trainer of TRL."""

    trains_chats: ClassVar[bool] = False
    """Whether all answers of a chat are trained, and not only one that follows a prompt."""
    model: ModelInput
    """The model to start from: a Hugging Face directory (`$base`), or a PEFT adapter's (`$sft`), opened on its base."""
    base: Input | None = None
    """The model that the adapter `model` was trained on; by default the one that its config names."""
    adapter: Literal["continue", "new"] | None = None
    """Where `model` is an adapter: `continue` trains it on (the default without `lora`); `new` merges it in memory and
    trains a new one on top, which is published as one with it, or, without `lora`, all weights."""
    pad_token: str | None = None
    """A token of the vocabulary to fill rows with; by default the tokenizer's own, one that its maker's configs name,
    one that was made for it, or the end of text. No result depends on it."""
    chat_template: ChatTemplate | None = None
    """A Jinja file, `chatml`, or a template of TRL by its name (`qwen3`), in place of the model's own."""
    added_tokens: list[str] = Field(default_factory=list)
    """Special tokens to add to the tokenizer; the embedding and the head grow where needed, and are trained there."""
    global_batch_size: int = Field(default=32, ge=1)
    """Rows in one optimizer step, over all processes and accumulation steps; at least 1."""
    per_device_train_batch_size: Execution[int] = Field(default=8, ge=1)
    """Rows that one process works on at once; divides the global batch, and the result does not depend on it. If not
    given, the largest such number up to 8."""
    data: list[Source] = Field(min_length=1)
    """What to learn from; at least one file or folder."""
    precision: Precision = "auto"
    """What matrices are multiplied in, where `trainer` sets neither `bf16` nor `fp16`; weights are float32 unless
    `model_init_kwargs` says otherwise. `auto`: bfloat16 where it is fast."""
    heldout: Annotated[float, Field(gt=0, lt=1)] | list[Source] | None = None
    """Rows to measure the loss on before the first step, every `eval_steps` and at the end, and never to train on: a
    share of `data`, drawn by the seed, or files."""
    bad_rows: BadRows = "error"
    """What is done with rows that can't be used: an error that counts them, or they are dropped and counted."""
    overlong: Overlong = "error"
    """What is done with rows of more than `max_length` tokens, or more than the model's positions: `error`; `drop`;
    `truncate`: keep what ends with the last answer that fits whole; `cut`: keep as many tokens as fit. A row of which
    nothing to learn would be left is dropped and counted."""
    earlier_answers: EarlierAnswers = "own_row"
    """What is done with answers that the chat template renders otherwise once more follows (without their reasoning):
    each is trained in a sequence of its own, as the model will be asked for it, or not at all (`skip`). For
    `posttrain.sft` and `posttrain.distill`."""
    logging_steps: Execution[int] = Field(default=1, ge=1)
    """Optimizer steps from one line of `metrics.jsonl` to the next; a line speaks of its own step, not of a mean."""
    lora: Annotated[dict[str, Any] | None, Library("peft.LoraConfig", owned=LORA_OWNED)] = None
    """PEFT's own settings of the adapter (`r`, `lora_alpha`, `target_modules`, …); none: all weights are trained."""
    quantization: dict[str, Any] | None = None
    """The settings of transformers' BitsAndBytesConfig (`load_in_4bit: true`) for the frozen weights under an adapter;
    on CUDA only."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Any field of the library's own config; each stage names the dataclass that checks it."""

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained and published, and not all weights."""
        return self.lora is not None or (self.adapter != "new" and model_folder.is_adapter(self.model))

    @property
    def computes_in(self) -> str:
        """What matrices are multiplied in: as `trainer` says with `fp16` or `bf16`, else `precision`."""
        bf16 = self.trainer.get("bf16")
        if self.trainer.get("fp16"):
            return "float16"
        if bf16 is None:
            return self.precision
        return "bfloat16" if bf16 else "float32"

    @property
    def longest(self) -> int:
        """Tokens in the longest sequence."""
        return int(self.trainer.get("max_length") or MAX_LENGTH)

    def require_adapter_choice(self) -> None:
        """Check the keys that only an adapter as `model` gives a meaning; its folder has to be there.

        Raises:
            UserError: they don't fit what `model` is.
        """
        if not model_folder.is_adapter(self.model):
            for key in ("adapter", "base"):
                if getattr(self, key) is not None:
                    raise UserError(f"is for an adapter, and {self.model} is a model", key=key, hint="leave it out")
        elif self.lora is not None and self.adapter is None:
            hint = "`adapter: new` trains another on top of it; without `lora` it is trained on"
            raise UserError("`model` is an adapter already", key="lora", hint=hint)

    @model_validator(mode="after")
    def _fit_each_other(self) -> "TrlConfig":
        if self.adapter == "continue" and self.lora is not None:
            hint = "leave it out, or write `adapter: new`"
            raise UserError("`adapter: continue` keeps the settings that the adapter has", key="lora", hint=hint)
        if self.earlier_answers != "own_row" and not self.trains_chats:
            problem = "is for chats: what stands in a prompt is never trained"
            raise UserError(problem, key="earlier_answers", hint="leave it out")
        if (schedule := self.trainer.get("lr_scheduler_type")) in FOLLOW_EVALUATIONS:
            problem = f"{schedule} follows evaluations of TRL's own, of which there are none: the rate would not change"
            raise UserError(problem, key="trainer.lr_scheduler_type", hint="write `cosine` or `linear`")
        steps = self.trainer.get("max_steps")
        self.require_steps(steps if isinstance(steps, int) and steps > 0 else None)
        require_whole_batches(self.global_batch_size, self.per_device_train_batch_size, self.launch.num_processes)
        return self
