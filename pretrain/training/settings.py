"""How a training runs: the keys of `pretrain.train` that its loop reads."""

from typing import Literal

from pydantic import Field, model_validator

from cordee.config import Execution, Precision, TrainingConfig, require_whole_batches


class Settings(TrainingConfig):
    """Batches, optimizer, precision, and what is saved and measured on the way."""

    max_steps: int = Field(ge=1)
    """Optimizer steps of the whole training."""
    global_batch_size: int = Field(ge=1)
    """Sequences in one optimizer step, over all processes and accumulation steps."""
    sequence_length: int = Field(ge=2)
    """Tokens in one sequence; documents share a sequence and do not see each other."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises to its peak in a line."""
    decay_steps: int = Field(default=0, ge=0)
    """Last steps, in which it falls as `1 - sqrt`; between the two it is constant (WSD)."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Where the fall ends, as a share of the peak."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's decoupled decay, for matrices only; no norm, bias or scalar decays."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients whose norm is larger are scaled down to it."""
    precision: Precision = "auto"
    """What matrices are multiplied in; weights, loss and optimizer are float32. `auto`: bfloat16 where it is fast."""
    eval_steps: int = Field(default=0, ge=0)
    """Steps from one measurement of held-out bits per byte to the next; 0: only at the end."""
    per_device_train_batch_size: Execution[int] = Field(default=8, ge=1)
    """Sequences that one process works on at once; the gradients of several such are added up to a global batch."""
    compile: Execution[Literal["auto", "on", "off"]] = "auto"
    """Whether torch compiles the model; `auto`: where the training is long enough to win the time back."""
    logging_steps: Execution[int] = Field(default=10, ge=1)
    """Steps from one line of `metrics.jsonl` to the next."""
    report_to: Execution[list[str]] = Field(default_factory=list)
    """Trackers of accelerate that are told as well, such as `tensorboard`; their files go to `logs/`."""

    @model_validator(mode="after")
    def _fit_each_other(self) -> "Settings":
        self.require_steps(self.max_steps)
        require_whole_batches(self.global_batch_size, self.per_device_train_batch_size, self.launch.num_processes)
        return self
