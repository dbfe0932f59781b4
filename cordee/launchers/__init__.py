"""Launchers start jobs. A launcher gets a `Job` and knows nothing of stages; stages know nothing of launchers."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from cordee import lock
from cordee.artifact import Store
from cordee.stage import CACHE

RUNNER = "CORDEE_RUNNER"
"""The variable that tells a stage's processes which process runs them (JSON, as `lock.owner` has it)."""


@dataclass(frozen=True)
class Job:
    """A process to start."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    """Set in addition to this process's environment."""
    log: Path
    """Standard output and error are appended here."""


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
