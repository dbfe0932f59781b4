"""The certificate that a proof writes: a claim, the checks that support it, and the evidence.

A proof collects its checks and calls `write`, which refuses a certificate of which a check failed: a certificate that
exists holds.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cordee import files
from cordee.config import Config
from cordee.errors import Fault

NAME = "certificate.json"
Value = bool | int | float | str


class Conditions(Config):
    """Base of a proof's `Config`."""

    conditions: dict[str, Any] = Field(default={})
    """What the certificate holds for besides the other keys: the version and the execution keys of the stage, the
    machine, and packages; `cordee prove` sets it."""


class Check(BaseModel):
    """One check: a measured value and the limit that it was compared with."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: str
    value: Value
    limit: Value
    """A number, or a condition in words such as `at least 1`."""
    passed: bool


class Certificate(BaseModel):
    """What was proven, and how."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    proof: str
    """The proof's name: `resume` for `pretrain.prove_resume`."""
    of: str
    """The module of the stage that was examined."""
    claim: str
    conditions: dict[str, Any] = {}
    """What it holds for, besides the keys of its stage."""
    checks: tuple[Check, ...]
    evidence: Any = None
    """JSON of the proof's own: examples, hashes, versions."""


def at_most(name: str, value: float, limit: float) -> Check:
    """A check that passes where `value` is at most `limit`; NaN fails."""
    return Check(name=name, value=value, limit=limit, passed=bool(value <= limit))


def at_least(name: str, value: float, limit: float) -> Check:
    """A check that passes where `value` is at least `limit`; NaN fails."""
    return Check(name=name, value=value, limit=f"at least {limit}", passed=bool(value >= limit))


def write(folder: Path, certificate: Certificate) -> None:
    """Write `certificate.json` into a folder.

    Raises:
        Fault: a check failed, or there is none; names every failed check.
    """
    failed = [f"{check.name} is {shown(check.value)} (limit {check.limit})" for check in certificate.checks
              if not check.passed]  # fmt: skip
    if failed or not certificate.checks:
        raise Fault(f"{certificate.proof} is not proven: {'; '.join(failed) or 'nothing was checked'}", file=folder)
    files.write_json(folder / NAME, certificate.model_dump(mode="json"))


def read(folder: Path) -> Certificate:
    """The certificate in a folder.

    Raises:
        Fault: there is none, or it can't be read.
    """
    try:
        return Certificate.model_validate(files.read_json(folder / NAME))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise Fault(f"is no certificate: {first['msg']}", file=folder / NAME, key=key) from error


def shown(value: Value) -> str:
    """A value in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
