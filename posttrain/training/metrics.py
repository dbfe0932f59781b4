"""What a training reads, and what the manifest says of one that has ended."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer

from cordee import files, model_folder
from cordee.cost import training_flops
from cordee.stage import Context
from posttrain.training import adapters, heldout, reading
from posttrain.training.compiling import is_compiled
from posttrain.training.cost import FORWARD, passes
from posttrain.training.order import set_order
from posttrain.training.points import HasExtraState
from posttrain.training.settings import TrlConfig
from posttrain.training.watch import Watch


@dataclass(frozen=True)
class TrainingData:
    """What a stage trains on: its size, what its batches count for, and what the stage's metrics say of it."""

    count: Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]]
    """From a batch as the collator made it to its number of `tokens` without padding, and what else is counted."""
    weigh: Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]] | None
    """From a batch to the number of what its `loss` is a mean over, and so of other figures that TRL measures; None of
    a trainer that makes a step's means itself."""
    rows: int
    """Rows of the data: chats, or preference pairs."""
    tokens: int
    """Tokens of one pass over the data."""
    sequence_length: int
    """Tokens in a sequence, for the FLOPs of attention."""
    digest: str
    """Of the token ids of one pass over the data, and of where they carry loss."""
    has_reference: bool = False
    """Whether a frozen reference model reads each token of the data once as well."""
    has_kl: bool = False
    """Whether the model reads as many answers to other prompts in each step, and the reference once."""
    teacher_parameters: int = 0
    """Parameters of a frozen model of another size that reads each token as well."""
    varying_shapes: bool = True
    """Whether batches have different shapes, which takes longer to compile."""
    can_compile: bool = True
    """Whether the model may be compiled where that pays."""
    order: Callable[[Trainer, TrlConfig, Context], None] = set_order
    """Sets the number of steps, and in which order rows are seen."""
    epoch_rows: float | None = None
    """Rows of all steps of one epoch, where these are not the data's own: completions of prompts."""
    extra: HasExtraState | None = None
    """The trainer, where it has a state beside model, optimizer and schedule."""
    measure: Callable[[Trainer, Any], dict[str, float]] = heldout.measure
    """Gives the figures of the rows that are held out; it is given `weigh`."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Further metrics of the stage."""


def counted(sides: int, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The `tokens` of a batch `[sides · rows, seq]` without padding, and its `pairs` or `answers`: scalars."""
    mask = batch["attention_mask"]
    return {"tokens": mask.sum(), "pairs" if sides > 1 else "answers": mask.new_tensor(len(mask) // sides)}


def of_training(
    trainer: Trainer, data: TrainingData, config: TrlConfig, context: Context, watch: Watch
) -> dict[str, Any]:
    """What the manifest says of a training that has ended."""
    state, model = trainer.state, trainer.accelerator.unwrap_model(trainer.model)
    sources = files.read_json(context.out / reading.ROWS)["sources"]
    last: dict[str, float] = next((row for row in reversed(state.log_history) if "loss" in row), {})
    return {
        **{
            name: float(value)
            for name, value in last.items()
            if name not in ("step", "num_tokens") and value is not None
        },
        **watch.totals,
        **watch.heldout,
        "epoch": watch.epochs(state.global_step),
        "steps": state.global_step,
        "rows": data.rows,
        "rows_left_out": sum(kind["rows"] for source in sources for kind in source["left_out"]),
        "flops": flops(trainer, data, config, watch.totals["tokens"]),
        "parameters": _parameters(model),
        "vocab_size": model_folder.shape(model.config.to_dict()).vocab_size,
        "num_processes": trainer.accelerator.num_processes,
        "compiled": is_compiled(trainer),
        **data.metrics,
    }


class Means:
    """Means of what TRL measures over all that a step holds: TRL's own are means of its batches' means."""

    def __init__(
        self, trainer: Trainer, weigh: Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]] | None
    ) -> None:
        """Means of a trainer's figures, weighed as `TrainingData` says."""
        self._trainer, self._weigh = trainer, weigh
        self._sums: dict[str, float] = {}
        """Of the weights, since the figures were last logged."""

    def add(self, batch: Mapping[str, Any]) -> None:
        """Weigh the figures of the batch that was just measured, this process's share of it."""
        if self._weigh is None:
            return
        weights = self._weigh(batch)
        names = [name for name in weights if name != "loss"]  # the loss is summed over tokens by TRL itself
        summed = self._trainer.accelerator.reduce(torch.stack([weights[name] for name in names]), "sum")
        for name, weight in zip(names, summed.tolist(), strict=True):
            values = self._trainer._metrics["train"][name]  # noqa: SLF001 - of each batch since it was last logged
            before = self._sums.get(name, 0.0) if len(values) > 1 else 0.0
            self._sums[name] = before + weight
            *mean, value = values
            values[:] = [(sum(mean) * before + value * weight) / max(before + weight, 1.0)]


def flops(trainer: Trainer, data: TrainingData, config: TrlConfig, tokens: float) -> float:
    """FLOPs to train on so many tokens."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    shape = model_folder.shape(model.config.to_dict())

    def work(of: float) -> float:
        return training_flops(_parameters(model), of, shape.layers or 0, shape.width or 0, data.sequence_length)

    once = FORWARD * work(data.tokens) if data.has_reference else 0.0
    further = once + FORWARD * work(tokens) if data.has_kl else 2.0 * data.teacher_parameters * tokens
    return passes(config) * work(tokens) + once + further


def _parameters(model: torch.nn.Module) -> int:
    """How many weights a model has, without a second copy of its adapter that a reference is computed with."""
    named = model.named_parameters()
    return sum(_size(weights) for name, weights in named if adapters.REFERENCE not in name.split("."))


def _size(weights: torch.nn.Parameter) -> int:
    """How many numbers; bitsandbytes keeps two of four bits in one byte, and their shape beside them."""
    quantized = getattr(weights, "quant_state", None)
    return weights.numel() if quantized is None else math.prod(quantized.shape)
