"""Loss spikes: the training goes back to a resume point before one, and leaves out the rows that led to it.

As PaLM's training did (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1): the same rows with other weights make no
spike, and neither do other rows with the same weights.
"""

import math
import shutil
import statistics
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from cordee.compute import resume
from cordee.errors import Fault
from pretrain.training.settings import LossSpikes

if TYPE_CHECKING:
    from pretrain.training.loop import State, Training

WINDOW = 32
"""Losses of so many steps before it say what is usual."""


def is_one(loss: float, grad_norm: float, recent: list[float], settings: LossSpikes) -> bool:
    """Whether a step is a spike.

    Args:
        loss: mean of the step, in nats.
        grad_norm: of its gradient.
        recent: the losses of the steps before it; of fewer than `WINDOW` only what is no number counts.
        settings: how far a loss may lie above the median of these.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return True
    return len(recent) >= WINDOW and loss > statistics.median(recent) + settings.nats


def go_back(training: "Training", state: "State", loss: float, settings: LossSpikes) -> "State":
    """Restore a resume point, and have the rows since then, the spike's and some more left out.

    Args:
        training: whose weights and moments are restored.
        state: before the step that was a spike.
        loss: of that step.
        settings: how far, and how often.

    Raises:
        Fault: it happened too often, or there is no resume point.
    """
    context, step = training.context, state.step + 1
    said = f"step {step}: the loss is {loss:.4g}"
    if state.rollbacks >= settings.rollbacks:
        hint = "lower learning_rate, or look at the data"
        raise Fault(f"{said}, after {state.rollbacks} rollbacks", file=context.out, hint=hint)
    training.saver.wait()
    training.optimizer.zero_grad()
    folder = context.out / "resume"
    found = _before(training, step - settings.back_steps) if context.is_main else None
    at = broadcast_object_list([found])[0]
    if at is None:
        raise Fault(f"{said}, and there is no resume point yet", file=context.out, hint="lower learning_rate")
    point = resume.at(folder, at)
    resume.restore(point, training.objective, training.optimizer)
    training.accelerator.wait_for_everyone()
    if context.is_main:  # what came after it must not be taken for what comes now
        for path in folder.iterdir():
            if path.name.isdecimal() and int(path.name) > at:
                shutil.rmtree(path)
    context.rewind(at)
    restored = type(state).of(point.state)
    restored.rollbacks = state.rollbacks + 1
    restored.skipped = step + state.skipped + settings.skip_steps - at
    left_out = restored.skipped - state.skipped
    context.incident("loss spike", step, f"{said}: goes back to step {at} and leaves out the rows of {left_out} steps")
    training.accelerator.wait_for_everyone()
    return restored


def _before(training: "Training", step: int) -> int | None:
    """The newest resume point at a step or before it, else the oldest; None if there is none."""
    folder = training.context.out / "resume"
    points = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())
    return max((one for one in points if one <= step), default=points[0] if points else None)
