"""Trainings that are measured, each in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


class Process:
    """A training by a checkout's code; one that fails ends the benchmark."""

    def __init__(self, command: list[str], place: Path, checkout: Path) -> None:
        """Nothing is started yet.

        Args:
            command: the argument vector.
            place: a folder for its log and caches.
            checkout: where the code is.
        """
        self.command, self.place, self.checkout, self.log = command, place, checkout, place / "stderr"
        self.peak_bytes = 0
        """The largest resident set of it and of the processes that it waited for, once it has ended."""

    def lines(self) -> Iterator[str]:
        """Run it, and give what it prints line by line."""
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
        own = {"PYTHONPATH": str(self.checkout), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        own["HF_HOME"] = str(self.place / "hf")
        with self.log.open("w") as errors:
            process = subprocess.Popen(
                self.command, env={**os.environ, **offline, **own}, cwd=self.place, stdout=subprocess.PIPE,
                stderr=errors, text=True,
            )  # fmt: skip
            yield from process.stdout or ()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        self.peak_bytes = used.ru_maxrss * 1024
        if process.returncode:
            sys.exit(f"{' '.join(self.command)}\n{self.log.read_text()[-2000:]}")
