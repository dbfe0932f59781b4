"""What runs beside TRL's trainer: resume points that survive a kill, progress, metrics, intermediate checkpoints."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState

from cordee import retention
from cordee.compute import device
from cordee.errors import Fault
from cordee.seeds import seed_of
from posttrain.training.points import Points
from posttrain.training.settings import TrlConfig


class Watch(TrainerCallback):
    """Reports progress and metrics, publishes checkpoints, marks resume points, and stops where asked to."""

    def __init__(
        self,
        points: Points,
        config: TrlConfig,
        begin: Callable[[int], None],
        publish: Callable[[Path], None],
        measure: Callable[[], dict[str, float]],
        epoch_rows: float,
    ) -> None:
        """Watch a trainer.

        Args:
            points: the trainer's resume points.
            config: the stage's config.
            begin: told the number of steps before the first.
            publish: writes a model's folder.
            measure: gives figures of the rows that are held out; none where no rows are.
            epoch_rows: rows of all steps of one epoch.
        """
        self.points, self.trainer, self.context, self.config = points, points.trainer, points.context, config
        self.begin, self.publish, self.measure, self.epoch_rows = begin, publish, measure, epoch_rows
        self.heldout: dict[str, float] = {}
        """The last figures of the rows that are held out."""
        self.stopping = False
        self.totals: Counter[str] = Counter()
        """Tokens and what else is counted, from the first step on, over all processes."""
        self._since_step: dict[str, torch.Tensor] = {}
        self._began: tuple[float, int] | None = None
        """When this attempt's first step had ended, and the tokens up to there."""
        self._told_s = 0.0
        self._saves = 0
        """How many processes saw that a resume point is asked for."""
        self._figures: dict[str, float] = {}

    def epochs(self, step: int) -> float:
        """How often the rows have been seen after a step; to `Trainer`, the whole training is one epoch."""
        return step * self.config.global_batch_size / self.epoch_rows

    def count(self, counts: Mapping[str, torch.Tensor]) -> None:
        """Add what a batch of this process counts for."""
        for name, value in counts.items():
            self._since_step[name] = self._since_step.get(name, 0) + value

    def on_train_begin(self, _args: Any, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Check that several processes really train one model, and that there are the steps to publish."""
        self.config.require_steps(state.max_steps)
        wrapped = getattr(self.trainer.model_wrapped, "_orig_mod", self.trainer.model_wrapped)
        device.require_wrapped(wrapped, self.trainer.accelerator.num_processes, self.config.launch)
        self.context.heart.begin("compile", state.global_step)
        self.points.begin()
        self.begin(state.max_steps)
        if not state.global_step:
            self._measure(0)
        self.context.heart.enter("data")

    def _measure(self, step: int) -> None:
        """Measure the rows that are held out, and tell the figures."""
        self.context.heart.enter("evaluation")
        self.heldout = self.measure()
        if self.heldout:
            self.context.log(step, **self.heldout)
            self.trainer.accelerator.log(self.heldout, step=step)
            shown = ("heldout_loss", "heldout_reward")
            self._figures |= {name: self.heldout[name] for name in shown if name in self.heldout}

    def on_step_begin(self, _args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """The rows of a step are there; its random numbers follow from seed, step and process."""
        drawn = seed_of(self.context.seed, state.global_step, self.trainer.accelerator.process_index)
        transformers.set_seed(drawn % 2**32)
        self.context.heart.enter("step")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the step, publish its checkpoint, measure, and stop where asked to; `on_log` follows."""
        names, context = list(self._since_step), self.context
        context.heart.stepped(state.global_step)
        flags = [context.stop_requested(), context.save_requested()]
        asked, self._saves, *counted = _summed([*flags, *self._since_step.values()], args.device)
        self.totals.update(dict(zip(names, counted, strict=True)))
        self._since_step = {}
        if self.config.saves_at(state.global_step):
            context.heart.enter("checkpoint")
            self.publish(context.out / "checkpoints" / str(state.global_step))
        is_last, every = state.global_step >= state.max_steps, self.config.eval_steps
        if is_last or (every and state.global_step % every == 0):
            self._measure(state.global_step)
        if context.is_main and self.config.keep_checkpoints and self.config.saves_at(state.global_step):
            retention.apply(context.out, self.config.keep_checkpoints)
        if asked and not is_last:
            self.stopping = control.should_training_stop = True
        is_due = self.stopping or self._saves or state.global_step % self.config.resume_steps == 0
        control.should_save = bool(is_due) and not is_last  # resumed from its last step, `Trainer` would take one more
        context.heart.enter("checkpoint" if control.should_save else "data")

    def _report(self, state: TrainerState) -> None:
        now, tokens = time.monotonic(), self.totals["tokens"]
        if self._began is None:
            self._began = now, tokens
        if now - self._told_s < 1 and state.global_step != state.max_steps:
            return
        self._told_s = now
        seconds, since = now - self._began[0], tokens - self._began[1]
        speed = {"tokens_per_s": float(round(since / seconds))} if since else {}
        self.context.progress(state.global_step, state.max_steps, "steps", **self._figures, **speed)

    def on_log(
        self, _args: Any, state: TrainerState, _control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """Write one line of metrics and report progress, at most once a second, with this step's figures.

        A loss or a gradient that is no number ends the training, before it is saved.

        Raises:
            Fault: there is one.
        """
        if "loss" not in logs:
            return
        # TRL counts padding too; where nothing was measured it says None
        values = {name: float(value) for name, value in logs.items() if name != "num_tokens" and value is not None}
        values["epoch"] = self.epochs(state.global_step)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values.get(name, 0.0)):
                raise Fault(
                    f"the {name} is {values[name]} at step {state.global_step}",
                    file=self.context.out,
                    hint="lower trainer.learning_rate, or look at the data of this step",
                )
        if state.global_step % self.config.logging_steps == 0 or state.global_step == state.max_steps:
            self.context.log(state.global_step, **values, tokens=self.totals["tokens"])
            self.trainer.accelerator.log(values, step=state.global_step)
        self._figures |= {name: values[name] for name in ("loss", "reward") if name in values}
        self._report(state)

    def on_save(self, *_: Any, **__: Any) -> None:
        """Begin to write a resume point; one that was asked for is awaited."""
        self.points.save(self.totals)
        if self._saves:
            self.points.saver.wait()
            self.context.drop_save_request()
        self.context.heart.enter("data")


def _summed(values: list[Any], where: torch.device) -> list[int]:
    """Each value summed over all processes: the same in every one, so that all of them stop at the same step."""
    sums = torch.stack([torch.as_tensor(value, dtype=torch.int64, device=where) for value in values])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return [int(value) for value in sums.tolist()]
