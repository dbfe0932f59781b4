"""The training loop. What changes from step to step is in `State`; everything else is fixed before the first step."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from cordee import files, retention
from cordee.compute import resume
from cordee.errors import Fault
from cordee.stage import Context
from pretrain.data.loader import Batch, assemble
from pretrain.data.mixture import Mixture, Sample, digest
from pretrain.training import checkpoint, heldout, schedules, spikes
from pretrain.training.heldout import Heldout
from pretrain.training.model import Objective
from pretrain.training.settings import Settings


@dataclass
class Window:
    """What was counted since the last line of `metrics.jsonl`."""

    loss: float = 0.0
    """Summed over the labels that count."""
    labels: int = 0
    """How many count."""
    tokens: int = 0
    seconds: float = 0.0
    samples: int = 0
    """Digest of the rows that all processes were given: of their ids, independent of order and grouping."""


@dataclass
class State:
    """What a training counts; with the weights and the optimizer's state all that a resume needs."""

    step: int = 0
    source_tokens: list[int] = field(default_factory=list)
    labels: int = 0
    """Labels that counted in the loss."""
    seconds: float = 0.0
    """Spent in training steps, not in compiling, measuring or saving."""
    loss: float | None = None
    """The last one logged."""
    window: Window = field(default_factory=Window)
    recent: list[float] = field(default_factory=list)
    """The losses of the last steps, by which a spike is known."""
    skipped: int = 0
    """Steps whose rows were left out."""
    rollbacks: int = 0
    """How often it went back."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> "State":
        """The state that `dataclasses.asdict` wrote down."""
        return cls(**{**values, "window": Window(**values["window"])})


@dataclass
class Training:
    """All that a training needs."""

    settings: Settings
    context: Context
    accelerator: Accelerator
    model: nn.Module
    """The objective as the processes run it: wrapped by DDP or FSDP where there are several."""
    objective: Objective
    """The same, without DDP."""
    optimizer: torch.optim.Optimizer
    saver: resume.Saver
    mixture: Mixture
    heldout: Heldout
    tokenizer: Path
    told_s: float = 0.0
    """When progress was last reported, by the monotonic clock."""

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Rows of one forward pass, and tokens of a row."""
        return self.settings.per_device_train_batch_size, self.settings.sequence_length


def train(training: Training, state: State) -> None:
    """Take the remaining steps; changes `state` and the model in place.

    Raises:
        Stopped: a stop was asked for; the state is saved.
        Fault: the loss or a gradient is not finite, or spikes too often.
    """
    settings, context = training.settings, training.context
    model, optimizer, accelerator = training.model, training.optimizer, training.accelerator
    while state.step < settings.max_steps:
        context.heart.begin("data", state.step)
        began = time.perf_counter()
        samples = _samples(training, state.step + state.skipped)
        batches = _batches(training, samples)
        context.heart.enter("step")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, state.step)
        # random numbers follow from seed, step and process: a resume needs no generator's state
        torch.manual_seed(_seed(context.seed, state.step, accelerator.process_index))
        sums = _accumulate(training, samples, batches)
        grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm))
        loss = sums["loss"] / sums["labels"]
        if settings.loss_spikes and spikes.is_one(loss, grad_norm, state.recent, settings.loss_spikes):
            vars(state).update(vars(spikes.go_back(training, state, loss, settings.loss_spikes)))
            continue
        _require_finite(loss, grad_norm, state.step + 1, training)
        state.recent = [*state.recent, loss][-spikes.WINDOW :] if settings.loss_spikes else []
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        context.heart.stepped(state.step)
        _count(training, state, samples, sums, time.perf_counter() - began)

        _keep(training, state, grad_norm)
        stop_asked, save_asked = _asked(training)
        if save_asked:
            context.heart.enter("checkpoint")
            training.saver.save(dataclasses.asdict(state))
            training.saver.wait()
            context.drop_save_request()
        if stop_asked:
            stop(training, state)


def _keep(training: Training, state: State, grad_norm: float) -> None:
    """Log, publish, save and measure what is due after a step.

    Raises:
        Stopped: a stop was asked for; the state is saved.
    """
    settings, context, step = training.settings, training.context, state.step
    last = step == settings.max_steps
    if last or step % settings.logging_steps == 0:
        _log(training, state, grad_norm)
    if settings.saves_at(step):
        context.heart.enter("checkpoint")
        checkpoint.save(training.objective.model, context, f"checkpoints/{step}", training.tokenizer)
    if last or step % settings.resume_steps == 0:
        context.heart.enter("checkpoint")
        training.saver.save(dataclasses.asdict(state))
    if settings.eval_steps and step % settings.eval_steps == 0 and not last:
        measure_heldout(training, state)
    if context.is_main and settings.keep_checkpoints and settings.saves_at(step):
        retention.apply(context.out, settings.keep_checkpoints)


def _samples(training: Training, step: int) -> list[Sample]:
    """The rows of a global batch, the number `step` of those in the stream."""
    size = training.settings.global_batch_size
    return [training.mixture.sample(index) for index in range(step * size, (step + 1) * size)]


def _batches(training: Training, samples: Sequence[Sample]) -> list[Batch]:
    """This process's share of a global batch, a forward pass each."""
    size, processes = training.batch_shape[0], training.accelerator.num_processes
    splits, pad_token_id = training.mixture.splits, training.objective.pad_token_id
    mine = [
        samples[start : start + size]
        for start in range(training.accelerator.process_index * size, len(samples), size * processes)
    ]
    return [
        assemble([(splits[one.source], one.row) for one in rows], *training.batch_shape, pad_token_id) for rows in mine
    ]


def _accumulate(training: Training, samples: Sequence[Sample], batches: Sequence[Batch]) -> dict[str, Any]:
    """Leave in `.grad` the gradient of the global batch's mean loss per label that counts; returns sums over it."""
    accelerator, model = training.accelerator, training.model
    labels = training.mixture.labels(samples)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    num_counted = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    for index, batch in enumerate(batches):
        synchronize = index == len(batches) - 1
        with contextlib.nullcontext() if synchronize else accelerator.no_sync(model):
            losses, counts, _ = model(*batch.to(accelerator.device))
            loss = losses.sum()
            if synchronize:
                training.context.heart.alone()
            # DDP and FSDP take the mean over processes: their number undoes it
            accelerator.backward(loss * (accelerator.num_processes / labels))
        loss_sum += loss.detach()
        num_counted += counts.sum()
    rows = [row.tobytes() for batch in batches for row in batch.input_ids.numpy()]
    given = sum(int((batch.labels >= 0).sum()) for batch in batches)
    mine = torch.tensor([given, sum(map(digest, rows))], device=accelerator.device)
    given, seen, counted = accelerator.reduce(torch.cat([mine, num_counted[None]]), "sum").tolist()
    if given != labels:
        raise Fault(f"the processes were given {given} labels of a batch that holds {labels}")
    if counted != labels:  # known only now: the division is by the labels that count
        for weights in model.parameters():
            if weights.grad is not None:
                weights.grad.mul_(labels / counted)
    return {"loss": float(accelerator.reduce(loss_sum, "sum")), "labels": counted, "samples": seen}


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of a step, from 0."""
    factor: float = getattr(schedules, settings.schedule)(step, settings)
    return settings.learning_rate * factor


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _require_finite(loss: float, grad_norm: float, step: int, training: Training) -> None:
    """Raise `Fault` before the weights are changed if the loss or the gradient is not finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        problem = f"step {step}: the loss is {loss} and the gradient's norm {grad_norm}"
        raise Fault(problem, file=training.context.out, hint="lower learning_rate, or look at the data of this step")


def _count(training: Training, state: State, samples: Sequence[Sample], sums: dict[str, Any], seconds: float) -> None:
    """Count a step, and report progress at most once a second."""
    tokens = training.mixture.tokens(samples)
    state.source_tokens = [before + now for before, now in zip(state.source_tokens, tokens, strict=True)]
    state.seconds += seconds
    window = state.window
    window.loss += sums["loss"]
    window.labels += sums["labels"]
    state.labels += sums["labels"]
    window.samples += sums["samples"]
    window.tokens += sum(tokens)
    window.seconds += seconds
    now = time.monotonic()
    if now - training.told_s >= 1 or state.step == training.settings.max_steps:
        training.told_s = now
        figures = {"loss": sums["loss"] / sums["labels"], "tokens_per_s": sum(tokens) / seconds}
        training.context.progress(state.step, training.settings.max_steps, "steps", **figures)


def _log(training: Training, state: State, grad_norm: float) -> None:
    """Write what the window counted, and begin a new one."""
    window, state.window = state.window, Window()
    state.loss = window.loss / window.labels
    figures: dict[str, float] = {
        "loss": state.loss,
        "learning_rate": learning_rate(training.settings, state.step - 1),
        "grad_norm": grad_norm,
        "tokens_per_s": window.tokens / window.seconds,
        "tokens": sum(state.source_tokens),
    }
    training.context.log(state.step, **figures, samples=f"{window.samples:x}")
    training.accelerator.log(figures, step=state.step)


def measure_heldout(training: Training, state: State) -> dict[str, Any]:
    """Held-out bits per byte, all and by language, logged at this step.

    Raises:
        Stopped: a stop was asked for; the state is saved.
    """
    training.context.heart.enter("evaluation")
    found = heldout.measure(
        training.heldout, training.objective, training.accelerator, training.batch_shape, lambda: stopping(training)
    )
    if found is None:
        stop(training, state)
    if training.context.is_main and not _is_measured(training.context, state.step):
        training.context.log(state.step, heldout_bits_per_byte=found["bits_per_byte"])
    training.accelerator.log({"heldout_bits_per_byte": found["bits_per_byte"]}, step=state.step)
    return found


def resume_measuring(training: Training, state: State) -> None:
    """Measure if a stop or kill came between the state's step and its measurement."""
    every, step = training.settings.eval_steps, state.step
    due = every and step and step % every == 0 and step < training.settings.max_steps
    if due and not _is_measured(training.context, step):
        measure_heldout(training, state)


def _is_measured(context: Context, step: int) -> bool:
    rows = files.read_json_lines(context.out / "metrics.jsonl")
    return any(row["step"] == step and "heldout_bits_per_byte" in row for row in rows)


def stopping(training: Training) -> bool:
    """Whether a stop was asked for, in all processes alike."""
    return _asked(training)[0]


def _asked(training: Training) -> tuple[bool, bool]:
    """Whether a stop, or a resume point, was asked for: the main process decides for all at the same step."""
    context = training.context
    asked = [context.stop_requested(), context.save_requested()] if context.is_main else [False, False]
    told = torch.tensor(asked, dtype=torch.int64, device=training.accelerator.device)
    stop_asked, save_asked = training.accelerator.reduce(told, "sum").tolist()
    return bool(stop_asked), bool(save_asked)


def stop(training: Training, state: State) -> NoReturn:
    """Save the state and end the run.

    Raises:
        Stopped: always.
    """
    training.saver.save(dataclasses.asdict(state))
    training.saver.wait()
    training.context.stop(f"step {state.step} of {training.settings.max_steps}")
    raise AssertionError  # `Context.stop` raised


def first_batch(training: Training) -> None:
    """One forward and backward pass over the first rows; its gradients are not used."""
    samples = _samples(training, 0)[: training.batch_shape[0] * training.accelerator.num_processes]
    _accumulate(training, samples, _batches(training, samples))
