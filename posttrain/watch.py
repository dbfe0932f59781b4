"""What runs beside TRL's trainer: resume points that survive a kill, progress, metrics, intermediate checkpoints.

A *resume point* is a checkpoint of transformers' `Trainer` below `resume/` that was flushed and then marked with the
hashes of its files. `Trainer` writes its checkpoints file by file, so one without a mark, or whose files are not
those that the mark lists, is what a kill has left and is deleted.
"""

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from cordee import files
from cordee.compute import device
from cordee.errors import Fault
from cordee.stage import Context
from posttrain.settings import TrlConfig

MARK, TOTALS = "complete.json", "totals.json"


@dataclass(frozen=True)
class Point:
    """A resume point that is whole."""

    folder: Path
    totals: dict[str, int]
    """What was counted up to it, over all processes."""

    @property
    def step(self) -> int:
        """The optimizer step after which it was written."""
        return int(self.folder.name.rpartition("-")[2])


def newest_resume_point(folder: Path) -> Point | None:
    """The newest resume point whose files are those that its mark lists; what a kill has left is deleted."""
    state = PartialState()
    if state.is_main_process:
        for path in folder.glob("checkpoint-*"):
            if not _is_whole(path):
                shutil.rmtree(path)
    state.wait_for_everyone()
    points = [Point(path, files.read_json(path / TOTALS)) for path in folder.glob("checkpoint-*")]
    return max(points, key=lambda point: point.step, default=None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has its mark, and every file that the mark lists with the same content."""
    try:
        hashes: dict[str, str] = files.read_json(checkpoint / MARK)
    except Fault:
        return False
    return all(
        (checkpoint / name).is_file() and files.sha256(checkpoint / name) == value for name, value in hashes.items()
    )


class Watch(TrainerCallback):
    """Reports progress and metrics, publishes checkpoints, marks resume points, and stops where asked to."""

    def __init__(
        self,
        trainer: Trainer,
        config: TrlConfig,
        context: Context,
        begin: Callable[[int], None],
        publish: Callable[[Path], None],
    ) -> None:
        """Watch a trainer; `begin` is told the number of steps before the first, `publish` writes a model's folder."""
        self.trainer, self.config, self.context = trainer, config, context
        self.begin, self.publish = begin, publish
        self.stopping = False
        self.totals: Counter[str] = Counter()
        """Tokens and what else is counted, from the first step on, over all processes."""
        self._since_step: dict[str, torch.Tensor] = {}
        self._began: tuple[float, int] | None = None
        """When this attempt's first step had ended, and the tokens up to there."""
        self._told_s = 0.0
        self._figures: dict[str, float] = {}

    def count(self, counts: Mapping[str, torch.Tensor]) -> None:
        """Add what a batch of this process counts for."""
        for name, value in counts.items():
            self._since_step[name] = self._since_step.get(name, 0) + value

    def on_train_begin(self, _args: Any, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Check that several processes really train one model, and that there are the steps to publish."""
        self.config.require_steps(state.max_steps)
        wrapped = getattr(self.trainer.model_wrapped, "_orig_mod", self.trainer.model_wrapped)
        device.require_wrapped(wrapped, self.trainer.accelerator.num_processes, self.config.launch)
        self.begin(state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the step, publish its checkpoint, report progress at most once a second, and stop where asked to."""
        names = list(self._since_step)
        asked, *counted = _summed([self.context.stop_requested(), *self._since_step.values()], args.device)
        self.totals.update(dict(zip(names, counted, strict=True)))
        self._since_step = {}
        if self.config.saves_at(state.global_step):
            self.publish(self.context.out / "checkpoints" / str(state.global_step))
        self._report(state)
        if state.global_step >= state.max_steps:
            control.should_save = False  # resumed from its last step, `Trainer` would take one more
        elif asked:
            self.stopping = control.should_save = control.should_training_stop = True

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
        """Write one line of metrics; a loss that is no number ends the training."""
        if "loss" not in logs:
            return
        values = {name: float(value) for name, value in logs.items() if name != "num_tokens"}  # TRL counts padding too
        if not math.isfinite(values["loss"]):
            raise Fault(
                f"the loss is {values['loss']} at step {state.global_step}",
                file=self.context.out,
                hint="lower trainer.learning_rate, or look at the data of this step",
            )
        if state.global_step % self.config.logging_steps == 0 or state.global_step == state.max_steps:
            self.context.log(state.global_step, **values, tokens=self.totals["tokens"])
        self._figures = {"loss": values["loss"]}

    def on_save(self, args: Any, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Flush the checkpoint that every process has written its part of, then mark it as whole."""
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files.write_json(folder / TOTALS, self.totals)
            files.sync_tree(folder)
            hashes = {str(path.relative_to(folder)): files.sha256(path) for path in files.walk(folder)}
            files.write_json(folder / MARK, hashes)
            files.sync_folder(folder.parent)
        processes.wait_for_everyone()


def _summed(values: list[Any], where: torch.device) -> list[int]:
    """Each value summed over all processes: the same in every one, so that all of them stop at the same step."""
    sums = torch.stack([torch.as_tensor(value, dtype=torch.int64, device=where) for value in values])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return [int(value) for value in sums.tolist()]
