"""Heartbeats: each process of a stage that trains says what it does, in a small file of its own.

    heartbeats/<rank>   one JSON line, overwritten in place: rank, host, pid, step, phase, and the seconds by phase

The phases follow each other: `import`, `data`, `compile`, then for each step `data` and `step`, and between them
`checkpoint` and `evaluation`; `end` is the last. The seconds of all of them add up to the process's life.
"""

import contextlib
import faulthandler
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cordee import machine

Phase = Literal["import", "data", "compile", "step", "checkpoint", "evaluation", "publish", "end"]
FOLDER = "heartbeats"
TRACE = signal.SIGUSR2
"""Has a process write the stack of each of its threads to its log, whatever it does, and hold whatever lock."""
BYTES = 512
"""Of the file: always the same, so that it needs no space on a disk that has become full."""
RECENT = 32
"""Steps of which the median is told."""
SHOWN_S = 1.0
"""A shared file system shows others what was written once the file is closed: done so often."""


def register() -> None:
    """Have this process write its stacks when it is sent `TRACE`: in C, so that a held GIL does not matter."""
    with contextlib.suppress(ValueError, OSError):  # standard error is no file: what starts the stage keeps no log
        faulthandler.register(TRACE, file=sys.stderr, all_threads=True, chain=False)


class Heart:
    """What this process does, told as it goes on."""

    def __init__(self, logs: Path) -> None:
        """Begin, in the phase `import`, with the time since the process was started.

        Args:
            logs: the folder of `events.jsonl`.
        """
        rank = int(os.environ.get("RANK", "0"))
        self._path = logs / FOLDER / str(rank)
        self._who = {"rank": rank, "host": platform.node(), "pid": os.getpid(), "started": machine.started(os.getpid())}
        self.phase: Phase = "import"
        self.step = 0
        self._taken = 0
        """Steps that this process has taken; `step` counts those of earlier attempts as well."""
        self._spent = defaultdict[str, float](float, {"import": machine.age_s(os.getpid())})
        self._since = self._closed = time.monotonic()
        self._data_s = self._own = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._file: int | None = None
        self._tell()

    def enter(self, phase: Phase) -> None:
        """Begin a phase: what is done until the next call counts as it."""
        self._spend()
        self.phase = phase
        self._tell()

    def begin(self, phase: Phase, step: int) -> None:
        """Begin a phase of a training that continues after `step`."""
        self.step = step
        self.enter(phase)

    def alone(self) -> None:
        """What this process did in this step up to here waited for no other process; called once a step, or never."""
        self._own = self._data_s + time.monotonic() - self._since

    def stepped(self, step: int) -> None:
        """A step is taken; what follows is the data of the next."""
        self.step = step
        self._taken += 1
        self._recent.append(self._own)
        self._own = 0.0
        self.enter("data")

    def _spend(self) -> None:
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        self._spent[self.phase] += seconds
        self._data_s = seconds if self.phase == "data" else 0.0

    def _tell(self) -> None:
        """Overwrite the file; a file system may fail for a moment: the next call tries again."""
        spent = {name: round(seconds, 3) for name, seconds in self._spent.items()}
        own = statistics.median(self._recent) if self._recent else 0.0
        told = {"step": self.step, "phase": self.phase, "taken": self._taken, "own_s": round(own, 6), "spent": spent}
        clocks = {"monotonic": round(self._since, 3), "time": round(time.time(), 3)}
        line = json.dumps({**self._who, **told, **clocks}).ljust(BYTES - 1) + "\n"
        with contextlib.suppress(OSError):
            if self._file is not None and self._since - self._closed > SHOWN_S:
                os.close(self._file)
                self._file = None
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
                self._closed = self._since
            os.pwrite(self._file, line.encode(), 0)


@dataclass(frozen=True)
class Beat:
    """What a process said last."""

    rank: int
    host: str
    pid: int
    started: str | None
    """When it was started, as `machine.started` has it: so that another process with its number is told apart."""
    step: int
    phase: Phase
    taken: int
    """Steps that it has taken since it was started."""
    own_s: float
    """Seconds of a recent step in which it waited for no other process, as a median."""
    spent: dict[str, float]
    """Seconds by phase, up to when this was said."""
    monotonic: float
    time: float

    @property
    def who(self) -> str:
        """How it is named: `rank 3 (process 1234 on node7)`."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.host == platform.node()


def read(logs: Path) -> list[Beat]:
    """The last word of each process of a stage, by rank; a line that is just being written is left out."""
    found = []
    for path in (logs / FOLDER).glob("*"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            told: dict[str, Any] = json.loads(path.read_bytes())
            found.append(Beat(**told))
    return sorted(found, key=lambda beat: beat.rank)


def clear(logs: Path) -> None:
    """Remove what the processes of an earlier attempt said."""
    for path in (logs / FOLDER).glob("*"):
        path.unlink(missing_ok=True)
