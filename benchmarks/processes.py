"""Trainings that are measured, each in a process of its own."""

import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class Failed(SystemExit):
    """A training that failed; what its process said last. It ends the benchmark unless it is caught."""


class Process:
    """A training by a checkout's code."""

    def __init__(self, command: list[str], place: Path, checkout: Path, limit_s: float | None = None) -> None:
        """Nothing is started yet.

        Args:
            command: the argument vector.
            place: a folder for its log and caches.
            checkout: where the code is.
            limit_s: seconds after which it is killed.
        """
        self.command, self.place, self.checkout, self.log = command, place, checkout, place / "stderr"
        self.limit_s = limit_s
        self.peak_bytes = 0
        """The largest resident set of it and of the processes that it waited for, once it has ended."""

    def lines(self) -> Iterator[str]:
        """Run it, and give what it prints line by line.

        Raises:
            Failed: it ended with an error, or was killed.
        """
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
        own = {"PYTHONPATH": str(self.checkout), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        own["HF_HOME"] = str(self.place / "hf")
        late = threading.Event()
        with self.log.open("w") as errors:
            process = subprocess.Popen(
                self.command, env={**os.environ, **offline, **own}, cwd=self.place, stdout=subprocess.PIPE,
                stderr=errors, text=True,
            )  # fmt: skip
            timer = threading.Timer(self.limit_s or threading.TIMEOUT_MAX, lambda: (late.set(), process.kill()))
            timer.daemon = True
            timer.start()
            yield from process.stdout or ()
            _, status, used = os.wait4(process.pid, 0)
            timer.cancel()
            process.returncode = os.waitstatus_to_exitcode(status)
        self.peak_bytes = used.ru_maxrss * 1024
        if late.is_set():
            raise Failed(f"not done after {self.limit_s:.0f} s")
        if process.returncode:
            raise Failed(f"{' '.join(self.command)}\n{self.log.read_text()[-2000:]}")


def step_s(events: Sequence[dict[str, Any]], skipped: int) -> float:
    """Seconds a step, by the times at which a stage's events report its steps, from step `skipped` on.

    Where steps are so short that no two of these are reported (at most one a second is), from the first one on.

    Raises:
        ValueError: fewer than two steps are reported at all.
    """
    reported = [row for row in events if row.get("unit") == "steps" and row["done"]]
    late = [row for row in reported if row["done"] >= skipped]
    steps = late if len(late) > 1 else reported
    if len(steps) < 2:
        raise ValueError(f"{len(steps)} steps are reported: too few to tell how long one takes")
    return float((steps[-1]["time"] - steps[0]["time"]) / (steps[-1]["done"] - steps[0]["done"]))
