"""Launchers start jobs. A launcher gets a `Job`, gives a `Handle`, and knows nothing of stages; nor do stages of it.

A launcher is one file with `start(job) -> Handle`: `local` starts a process on this machine, `slurm` processes on the
nodes of an allocation.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cordee import lock
from cordee.artifact import Store
from cordee.stage import CACHE

REQUEUE = 75
"""The exit code of a job whose time is over and whose stage has saved its state (EX_TEMPFAIL of sysexits.h)."""
RUNNER = "CORDEE_RUNNER"
"""The variable that tells a stage's processes which process runs them (JSON, as `lock.owner` has it)."""


@dataclass(frozen=True)
class Job:
    """What is to be started."""

    name: str
    argv: tuple[str, ...]
    """For one node; of several, a launcher starts it on each."""
    environment: dict[str, str]
    """Set in addition to this process's environment."""
    log: Path
    """Standard output and error are appended here."""
    stop: Path
    """A file whose existence asks the job to save and end."""
    nodes: int = 1
    cores: int | None = None
    """Of each node; None: all that there are."""


class Handle(Protocol):
    """A job that was started."""

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    def stop(self) -> None:
        """Ask it to save its state and end."""

    def kill(self) -> None:
        """End all of it at once, and wait for that."""

    def usage(self) -> int:
        """Peak memory of its largest process, in bytes, once it has ended."""


def environment() -> dict[str, str]:
    """What a stage's processes are told by the process that runs them, which is this one."""
    return {
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a folder `eval/` in the current folder is not the code that was planned
        RUNNER: json.dumps(lock.owner(os.getpid())),
    }


def caches(runs: Path) -> dict[str, str]:
    """Where torch, Triton and vLLM keep compiled code, and stages tokenized data: beside the artifacts, unless set."""
    compiled = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "VLLM_CACHE_ROOT": "vllm"}
    place = Store(runs).cache.absolute()
    return {name: str(place / folder) for name, folder in {CACHE: "", **compiled}.items() if name not in os.environ}
