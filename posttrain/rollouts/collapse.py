"""Signs that a run collapses, told from its metrics: entropy, length, equal rewards, a reward without held-out gain."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from cordee import files
from cordee.stage import Context

LEAST_STEPS = 6
"""Lines of metrics below which no change is told."""
ENTROPY, SHORTER, LONGER, CLIPPED, EQUAL = 0.1, 0.25, 4.0, 0.9, 0.9
"""Of its first value: entropy and length below, length above. Shares of all: completions cut off, equal groups."""
Row = Mapping[str, Any]


def signs(rows: Sequence[Row]) -> dict[str, str]:
    """The signs in the lines of `metrics.jsonl`, by kind; the first and the last tenth of the steps are compared."""
    steps = [row for row in rows if "entropy" in row]
    window, found = max(3, len(steps) // 10), {}
    first, last = steps[:window], steps[-window:]
    if (equal := _mean(last, "frac_reward_zero_std")) > EQUAL:
        found["equal"] = f"all completions have the same reward in {equal:.0%} of the groups: nothing is learnt of them"
    if (cut := _mean(last, "completions/clipped_ratio")) > CLIPPED:
        found["cut"] = f"{cut:.0%} of the completions are cut off at max_completion_length"
    return found if len(steps) < LEAST_STEPS else found | _changes(first, last) | _without_gain(rows, first, last)


def _changes(first: Sequence[Row], last: Sequence[Row]) -> dict[str, str]:
    """Entropy that falls, and completions that shrink or grow."""
    found = {}
    before, after = _mean(first, "entropy"), _mean(last, "entropy")
    if after < ENTROPY * before:
        found["entropy"] = f"entropy fell from {before:.3g} to {after:.3g} nats a token: completions become all alike"
    before, after = _mean(first, "completions/mean_length"), _mean(last, "completions/mean_length")
    if after < SHORTER * before:
        found["length"] = f"completions shrank from {before:.0f} to {after:.0f} tokens"
    elif after > LONGER * before:
        found["length"] = f"completions grew from {before:.0f} to {after:.0f} tokens"
    return found


def _without_gain(rows: Sequence[Row], first: Sequence[Row], last: Sequence[Row]) -> dict[str, str]:
    """A reward that rises in training, by more than its noise, and not on held-out prompts."""
    heldout = [float(row["heldout_reward"]) for row in rows if "heldout_reward" in row]
    before, after = _mean(first, "reward"), _mean(last, "reward")
    error = math.hypot(_error(first, "reward"), _error(last, "reward"))
    if len(heldout) < 2 or not after - before > 2 * error or heldout[-1] > heldout[0]:
        return {}
    told = f"the reward rose from {before:.3g} to {after:.3g}, and on held-out prompts it went from {heldout[0]:.3g}"
    return {"gain": f"{told} to {heldout[-1]:.3g}"}


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows if name in row]


def _mean(rows: Sequence[Row], name: str) -> float:
    values = _values(rows, name)
    return statistics.fmean(values) if values else math.nan


def _error(rows: Sequence[Row], name: str) -> float:
    """The standard error of a mean."""
    values = _values(rows, name)
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


class Watches(TrainerCallback):
    """Notes each sign once while a training runs, and at its end puts all that are there then into its metrics."""

    def __init__(self, context: Context, metrics: dict[str, Any]) -> None:
        """Read the metrics of a context; `metrics` is given `collapse`."""
        self.context, self.metrics = context, metrics
        self.noted: set[str] = set()

    def on_step_begin(self, _args: Any, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Look now and then, at what the steps before have written."""
        if state.global_step and state.global_step % max(LEAST_STEPS, state.max_steps // 50) == 0:
            self._look(self.context.out / "metrics.jsonl")

    def on_train_end(self, _args: Any, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Look for the last time."""
        self.metrics["collapse"] = "; ".join(self._look(self.context.out / "metrics.jsonl").values())

    def _look(self, path: Path) -> dict[str, str]:
        found = signs(files.read_json_lines(path)) if self.context.is_main else {}
        for kind, sign in found.items():
            if kind not in self.noted:
                self.noted.add(kind)
                self.context.note(sign)
        return found
