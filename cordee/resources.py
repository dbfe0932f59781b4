"""What a stage needs of a machine: the mapping `resources:` beside its keys in a recipe; no part of its identity."""

import re

from pydantic import Field, field_validator

from cordee.config import Config
from cordee.errors import UserError

TIME = re.compile(r"(?:(\d+)-)?(\d{1,3}):(\d\d):(\d\d)")


class Resources(Config):
    """What a stage needs; what is left out follows from its keys and from the cluster file."""

    gpus: int | None = Field(default=None, ge=0)
    """GPUs; of a training over all machines. Left out: as many as it has processes, or as vLLM divides a model over."""
    cores: int | None = Field(default=None, ge=1)
    """Cores of each machine, which also are its threads; left out: all, or the share of its GPUs."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory of each machine in GB (1e9 bytes); left out: all, or the share of its GPUs."""
    time: str | None = None
    """Time limit of its job, `HH:MM:SS` or `D-HH:MM:SS`; left out: that of the cluster file."""

    @field_validator("time")
    @classmethod
    def _is_time(cls, text: str | None) -> str | None:
        return text if text is None else require_time(text, "time")


def require_time(text: str, key: str) -> str:
    """A time limit as Slurm writes it.

    Raises:
        UserError: it is none.
    """
    if not TIME.fullmatch(text) or not seconds(text):
        raise UserError(f"{text!r} is no time limit", key=key, hint="write HH:MM:SS or D-HH:MM:SS")
    return text


def seconds(time: str) -> int:
    """A time limit in seconds."""
    match = TIME.fullmatch(time)
    days, hours, minutes, rest = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
