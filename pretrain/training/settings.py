"""How a training runs: the keys of `pretrain.train` that its loop reads."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cordee.config import Config, Execution, FunctionOf, Precision, TrainingConfig, require_whole_batches
from cordee.errors import UserError


class LossSpikes(Config):
    """The training goes back to a resume point, and leaves out the rows since then."""

    nats: float = Field(default=1.0, gt=0)
    """How far a step's loss may lie above the median of the 32 before it."""
    back_steps: int = Field(default=0, ge=0)
    """How far to go back at least, as far as there are resume points; the last two are kept."""
    skip_steps: int = Field(default=0, ge=0)
    """The rows of so many steps behind the spike are left out as well."""
    rollbacks: int = Field(default=3, ge=1)
    """How often; then the training ends with the diagnosis."""


class Settings(TrainingConfig):
    """Batches, loss, optimizer, schedule, precision, and what is saved and measured on the way."""

    max_steps: int = Field(ge=1)
    """Optimizer steps of the whole training."""
    global_batch_size: int = Field(ge=1)
    """Sequences in one optimizer step, over all processes and accumulation steps."""
    sequence_length: int = Field(ge=2)
    """Tokens in one sequence; documents share a sequence and do not see each other."""
    loss: Annotated[str, FunctionOf("pretrain.training.losses")] = "cross_entropy"
    """A function of `pretrain.training.losses`."""
    goldfish_k: int = Field(default=50, ge=2)
    """`goldfish` leaves out one label in `goldfish_k`."""
    goldfish_h: int = Field(default=50, ge=1)
    """Number of tokens before a label that decide whether `goldfish` leaves it out."""
    optimizer: Annotated[str, FunctionOf("pretrain.training.optimizers")] = "adamw"
    """A function of `pretrain.training.optimizers`."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay, for matrices only; no norm, bias or scalar decays."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of gradients, in `adamw` and `ademamix`."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the mean of squared gradients, in `adamw` and `ademamix`."""
    ademamix_beta3: float = Field(default=0.9999, gt=0, lt=1)
    """Decay of the slow mean of gradients in `ademamix`."""
    ademamix_alpha: float = Field(default=8.0, ge=0)
    """Weight of the slow mean in `ademamix`; that of the fast one is 1."""
    ademamix_warmup_steps: int | None = Field(default=None, ge=0)
    """Steps over which beta3 and alpha rise to their values; `max_steps` if not given."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Annotated[str, FunctionOf("pretrain.training.schedules")] = "wsd"
    """A function of `pretrain.training.schedules`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises linearly to its peak."""
    decay_steps: int = Field(default=0, ge=0)
    """Last steps, in which `wsd` decays as `1 - sqrt`; before them it is constant. `cosine` has none."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of the decay, as a share of the peak."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; larger ones are scaled down to it."""
    loss_spikes: LossSpikes | None = None
    """What is done about a step whose loss is no number or far above those before it; left out: what is no number ends
    the training."""
    precision: Precision = "auto"
    """What matrices are multiplied in; weights, loss and optimizer are float32. `auto`: bfloat16 where it is fast."""
    activation_checkpointing: Execution[Literal["none", "selective", "full"]] = "none"
    """What the backward pass computes again to save memory: nothing; of each layer all but products of matrices and
    attention (`selective`); or all of each layer (`full`, about a third more time)."""
    per_device_train_batch_size: Execution[int] = Field(default=8, ge=1)
    """Sequences in one forward pass of one process; gradients are accumulated up to a global batch. If not given, the
    largest number up to 8 that divides it."""
    logging_steps: Execution[int] = Field(default=10, ge=1)
    """Steps between two lines of `metrics.jsonl`."""

    @model_validator(mode="after")
    def _fit_each_other(self) -> "Settings":
        self.require_steps(self.max_steps)
        for key, variant in (("loss", "goldfish"), ("optimizer", "ademamix")):
            for name, field in type(self).model_fields.items():
                is_set = name.startswith(f"{variant}_") and getattr(self, name) != field.default
                if is_set and (chosen := getattr(self, key)) != variant:
                    raise UserError(f"{chosen} does not read it", key=name, hint=f"say {key}: {variant}")
        if self.schedule == "cosine" and self.decay_steps:
            raise UserError("cosine falls from the end of the warmup", key="decay_steps", hint="say 0")
        if self.activation_checkpointing != "none" and self.launch.devices().checkpoints:
            problem = f"fsdp_activation_checkpointing in {self.launch.config_file} does the same"
            raise UserError(problem, key="activation_checkpointing", hint="leave out one of them")
        require_whole_batches(self.global_batch_size, self.per_device_train_batch_size, self.launch.num_processes)
        return self
