"""Resume points of a TRL trainer, in place of its own checkpoints, which are pickles written by one process.

`Trainer` reads its own state file and skips the rows of the steps that were taken; weights, moments and the schedule
are put back here, once the model is wrapped and the optimizer is there.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from cordee import files
from cordee.compute import resume
from cordee.compute.resume import Point
from cordee.stage import Context


class HasExtraState(Protocol):
    """What a trainer has beside model, optimizer and schedule."""

    def extra_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Numbers of the training, and tensors of this process."""

    def load_extra_state(self, numbers: Mapping[str, Any], own: Mapping[str, torch.Tensor]) -> None:
        """Take what `extra_state` returned."""


class Points:
    """Writes a trainer's resume points, and has it resume from one; every process has one."""

    def __init__(self, trainer: Trainer, context: Context, point: Point | None, extra: HasExtraState | None) -> None:
        """Take the place of the trainer's own checkpoints.

        Args:
            trainer: that of TRL.
            context: where to write.
            point: where the training resumes.
            extra: the trainer, if it has more state.
        """
        self.trainer, self.context, self.point, self.extra = trainer, context, point, extra
        self._ends = contextlib.ExitStack()
        for name in ("save_checkpoint", "load_from_checkpoint", "load_optimizer_and_scheduler", "load_scaler",
                     "load_rng_state"):  # fmt: skip
            getattr(trainer, f"_{name}")  # another version of transformers may have another name
            setattr(trainer, f"_{name}", _nothing)

    def train(self) -> None:
        """Have the trainer take the steps that are left, and finish the point that is being written then."""
        with self._ends, tempfile.TemporaryDirectory(prefix="cordee-") as folder:
            if self.point:
                files.write_json(Path(folder) / TRAINER_STATE_NAME, self.point.state["trainer"])
            self.trainer.train(resume_from_checkpoint=folder if self.point else None)

    def begin(self) -> None:
        """Put the state of the point back, before the first step.

        Raises:
            Fault: the point lacks a part of it, or what each process had alone is of another number of them.
        """
        trainer, optimizer = self.trainer, self.trainer.optimizer
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.saver = self._ends.enter_context(resume.Saver(self.context, model, optimizer))
        if self.point is None:
            return
        resume.restore(self.point, model, optimizer)
        for group, told in zip(optimizer.param_groups, self.point.state["groups"], strict=True):
            group.update(told)
        for name, part in self._parts().items():
            part.load_state_dict(self.point.state[name])
        if self.extra:
            self.extra.load_extra_state(self.point.state["extra"], resume.own(self.point))

    def save(self, totals: Mapping[str, int]) -> None:
        """Begin to write a point after a step."""
        trainer, own = self.trainer, dict[str, torch.Tensor]()
        state = dataclasses.asdict(trainer.state) | {"log_history": [], "stateful_callbacks": {}}
        kept = {"step": trainer.state.global_step, "totals": dict(totals), "trainer": state}
        kept["groups"] = [
            {name: value for name, value in group.items() if isinstance(value, bool | int | float | str)}
            for group in trainer.optimizer.param_groups
        ]
        kept |= {name: part.state_dict() for name, part in self._parts().items()}
        if self.extra:
            kept["extra"], own = self.extra.extra_state()
        self.saver.save(kept, own)

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own, in plain numbers."""
        found = {"schedule": self.trainer.lr_scheduler, "scaler": self.trainer.accelerator.scaler}
        return {name: part for name, part in found.items() if part is not None}


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what `Trainer` would do."""
