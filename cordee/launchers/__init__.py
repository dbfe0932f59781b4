"""A launcher starts a job and knows no stage; a stage knows no launcher. A `Job` is all that passes between."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A process to start."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    """Set besides what this process has."""
    log: Path
    """Standard output and error are appended here."""
