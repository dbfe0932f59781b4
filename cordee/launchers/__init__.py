"""Launchers start jobs. A launcher gets a `Job` and knows nothing of stages; stages know nothing of launchers."""

from dataclasses import dataclass
from pathlib import Path

RUNNER = "CORDEE_RUNNER"
"""The variable that tells a stage's processes which process runs them (JSON, as `lock.owner` has it)."""


@dataclass(frozen=True)
class Job:
    """A process to start."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    """Set besides what this process has."""
    log: Path
    """Standard output and error are appended here."""
