"""The manifest of an artifact: its type, and the only code that reads and writes `manifest.json`.

The file states the SHA-256 of its own content (`files.write_sealed`), so a change of any bit in it is noticed.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from cordee import files
from cordee.errors import Fault

NAME = "manifest.json"
SCHEMA = 2
"""Raised when the fields below change; a manifest of another schema is not read."""
_FOLDER = re.compile(r"[\w-]+@\d+")


class _Part(BaseModel):
    """Base of the manifest and of what it holds: exact fields, exact types."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())


class Read(_Part):
    """One input of a stage: a place in an artifact, or a file or folder outside the store."""

    key: str
    """The key of the stage's config that named it."""
    artifact: str = ""
    """`recipe/stage@version`; empty for a file."""
    path: str = ""
    """The place within the artifact."""
    fingerprint: str = ""
    """The artifact's."""
    file: str = ""
    """The path as the config has it, or a reference to the hub with its commit; empty for an artifact."""
    sha256: str = ""
    """Of the file's content, or of a folder's file names and contents."""


class File(_Part):
    """One file of an artifact."""

    path: Annotated[str, AfterValidator(files.inside)]
    """Relative to the artifact's folder."""
    bytes: int
    sha256: str


class Host(_Part):
    """The machine that a stage ran on."""

    name: str
    cpu: str
    cores: int
    """Those that the process was allowed to use."""
    memory_bytes: int
    gpu: str | None
    platform: str


class Git(_Part):
    """The commit of the stage's module, and whether the working tree had changes."""

    commit: str
    dirty: bool


class Incident(_Part):
    """Something that went wrong while a stage ran, and what it cost."""

    kind: str
    """Its cause, as `cordee.causes` names it, or `straggler`."""
    text: str
    """Which process, where, and what was seen of it."""
    step: int
    """The last step that was taken before."""
    time: float
    """Seconds since 1970."""
    lost_s: float
    """Seconds until the stage was as far again."""


class Goodput(_Part):
    """What the time of a stage went to."""

    wall_s: float
    """Of all attempts, and of the waits between them where the same run restarted it."""
    seconds: dict[str, float]
    """`productive`, `start`, `data`, `compile`, `checkpoint`, `lost work`, `hang`, `restart`; they add up."""
    attempts: int
    incidents: tuple[Incident, ...]

    @property
    def share(self) -> float:
        """Productive time as a share of all."""
        return self.seconds["productive"] / self.wall_s if self.wall_s else 1.0


class Manifest(_Part):
    """What an artifact consists of, and what it was made from and with."""

    recipe: str
    stage: str
    version: int
    uses: str
    """The stage's module."""
    fingerprint: str
    """The SHA-256 of `identity`."""
    identity: dict[str, Any]
    execution: dict[str, Any]
    """The keys that only say how to execute."""
    inputs: tuple[Read, ...]
    started: str
    """ISO 8601, UTC: the last attempt."""
    host: Host
    packages: dict[str, str]
    python: str
    cordee: str
    git: Git | None
    metrics: dict[str, Any]
    """What the stage returned."""
    proves: str | None
    """For a certificate, the fingerprint of the stage that it examined."""
    seconds: float
    """Of all attempts together."""
    peak_memory_bytes: int
    """Of the largest process of the last attempt."""
    files: tuple[File, ...]
    goodput: Goodput | None = None
    """None in artifacts that were made before it was measured."""

    @property
    def name(self) -> str:
        """How recipes refer to the artifact: `quickstart/base@1`."""
        return f"{self.recipe}/{self.stage}@{self.version}"

    def names(self, shown: Callable[[str], str] = str) -> dict[str, str]:
        """What `identity` calls each input, and the name of its artifact or, as it is to be shown, its file."""
        found = {f"artifact {read.fingerprint}": read.artifact for read in self.inputs if read.artifact}
        return found | {f"content {read.sha256}": shown(read.file) for read in self.inputs if read.file}


def named(value: Any, names: Mapping[str, str]) -> str | None:
    """The name of the input that a value of an identity points to, and the place in an artifact; None for other values.

    Of a file, the identity has the kind in the place of a place.
    """
    head, slash, place = value.partition("/") if isinstance(value, str) else ("", "", "")
    if head not in names:
        return None
    return f"{names[head]}{slash}{place}" if head.startswith("artifact ") else names[head]


def write(folder: Path, manifest: Manifest) -> None:
    """Write a folder's manifest."""
    files.write_sealed(folder / NAME, {"schema": SCHEMA, **manifest.model_dump()})


def read(folder: Path) -> Manifest:
    """The manifest in a folder.

    Raises:
        Fault: there is none, or it is not what was written.
    """
    file = folder / NAME
    if not file.is_file():
        raise Fault("is missing", file=file)
    found = files.read_sealed(file)
    if (schema := found.pop("schema", None)) != SCHEMA:
        raise Fault(f"has schema {schema}, and this version reads {SCHEMA}", file=file)
    try:
        return Manifest.model_validate_json(json.dumps(found))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise Fault(f"can't be used: {first['msg']}", file=file, key=key) from error


def around(path: Path) -> Path | None:
    """The folder of the artifact that a path leads into: one that is named `stage@version` and has a manifest."""
    whole = path.resolve()
    above = (whole, *whole.parents)
    return next((one for one in above if _FOLDER.fullmatch(one.name) and (one / NAME).is_file()), None)
