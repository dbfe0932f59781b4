"""When a stage that trains hangs, and which of its processes is slow: decided from heartbeats, and nothing else."""

import statistics
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cordee import units
from cordee.heartbeat import RECENT, Beat

GRACE_S = 8.0
"""What takes less is no hang, however short the steps are."""
TIMES = 4.0
"""A step may take so many times as long as the longest recent one."""
KNOWN = 3
"""Steps after which the next can be judged: the first ones load kernels and fill caches."""
STEPS = 100
"""How many count as recent."""
PATIENCE_S = {
    "import": 900.0,
    "data": 1800.0,
    "compile": 1800.0,
    "step": 1800.0,
    "checkpoint": 900.0,
    "evaluation": 3600.0,
    "publish": 1800.0,
}
"""How long a process may be silent in a phase, where no pace is known."""
AT_ONCE_S = 1.0
"""Time that passes between two looks counts at most so much: the one who looks was stopped itself."""
SLOW, WELL_AGAIN = 1.5, 1.2
"""A process is slow, or no longer, where its own part of a step takes so many times as long as the others'."""
OF_A_STEP = 0.1
"""The least share of a step that a slow process has to cost."""
SLOW_S = 5.0
"""How long it has to be slow."""


@dataclass
class _Seen:
    """What is known of one process."""

    beat: Beat
    at_s: float
    """When it said so, by the time that was looked at."""
    stopped_s: float | None = None
    """Since when it is stopped."""
    slow_s: float | None = None
    """Since when it is slow."""
    is_named: bool = False
    """Whether it was said that it is."""


class Pace:
    """The pace of one attempt at a stage."""

    def __init__(self) -> None:
        self._time_s = 0.0
        self._last: float | None = None
        self._seen: dict[int, _Seen] = {}
        self._steps: deque[float] = deque(maxlen=STEPS)

    @property
    def limit_s(self) -> float | None:
        """How long the next step may take; None while that is not known."""
        return max(GRACE_S, TIMES * max(self._steps)) if self._steps else None

    def hang(self, beats: Sequence[Beat], now: float, stopped: Collection[int] = ()) -> str:
        """What hangs, and where; empty where nothing does.

        Args:
            beats: the last word of each process.
            now: seconds, by a clock that only goes forward.
            stopped: the ranks whose processes are seen to be stopped.
        """
        self._time_s += min(now - self._last, AT_ONCE_S) if self._last is not None else 0.0
        self._last = now
        for beat in beats:
            self._hear(beat, beat.rank in stopped)
        for seen in self._seen.values():
            if seen.stopped_s is not None and self._time_s - seen.stopped_s > GRACE_S:
                return f"{seen.beat.who} is stopped {_where(seen.beat)}"
        late = [seen for seen in self._seen.values() if self._time_s - seen.at_s > self._patience_s(seen.beat)]
        return self._told(late) if late else ""

    def be_patient(self) -> None:
        """Give each process as much time again."""
        for seen in self._seen.values():
            seen.at_s = self._time_s

    def slow(self, beats: Sequence[Beat]) -> str:
        """A process that became slow, and by how much; empty where none did."""
        for beat in beats:
            others = [one.own_s for one in beats if one.rank != beat.rank and one.taken >= RECENT]
            if beat.taken < RECENT or not others or not all(others):
                continue
            usual, seen = statistics.median(others), self._seen[beat.rank]
            if beat.own_s < WELL_AGAIN * usual:
                seen.slow_s, seen.is_named = None, False
            costs = beat.own_s - usual > OF_A_STEP * statistics.median(self._steps or [0.0])
            if beat.own_s < SLOW * usual or not costs:
                continue
            seen.slow_s = self._time_s if seen.slow_s is None else seen.slow_s
            if self._time_s - seen.slow_s > SLOW_S and not seen.is_named:
                seen.is_named = True
                return f"{beat.who} is slow: {beat.own_s:.3g} s of its own in a step, the others {usual:.3g} s"
        return ""

    def _hear(self, beat: Beat, is_stopped: bool) -> None:
        seen = self._seen.get(beat.rank)
        if seen is None or beat != seen.beat:
            taken, spent_s = (seen.beat.taken, _spent_s(seen.beat)) if seen else (0, 0.0)
            if beat.taken > taken:  # several steps since the last look count as one of their mean
                self._steps.append((_spent_s(beat) - spent_s) / (beat.taken - taken))
            kept = (seen.stopped_s, seen.slow_s, seen.is_named) if seen else (None, None, False)
            seen = self._seen[beat.rank] = _Seen(beat, self._time_s, *kept)
        if not is_stopped:
            seen.stopped_s = None
        elif seen.stopped_s is None:
            seen.stopped_s = self._time_s

    def _patience_s(self, beat: Beat) -> float:
        if beat.phase == "end":
            return float("inf")
        is_stepping = beat.phase in ("step", "data") and beat.taken >= KNOWN
        return (self.limit_s if is_stepping else None) or PATIENCE_S[beat.phase]

    def _told(self, late: Sequence[_Seen]) -> str:
        """A line on those that are late: first those that others may wait for, which are the furthest behind."""
        first = min(late, key=lambda seen: (seen.beat.step, seen.at_s))
        silent_s = self._time_s - first.at_s
        text = f"{first.beat.who} is silent for {units.duration(silent_s)} {_where(first.beat)}"
        if self._steps:
            text += f", where recent steps took at most {max(self._steps):.3g} s"
        return text + (f"; {len(late)} of {len(self._seen)} processes are" if len(late) > 1 else "")


def _spent_s(beat: Beat) -> float:
    """Seconds that a process has spent on its steps and their data."""
    return sum(beat.spent.get(name, 0.0) for name in ("data", "step"))


def _where(beat: Beat) -> str:
    return f"in phase {beat.phase} after step {beat.step}"
