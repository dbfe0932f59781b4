"""An artifact: a folder that a stage has published, `runs/<recipe>/<stage>@<n>`: whole, hashed, never changed.

A stage writes into `<stage>@<n>.partial`. Publishing flushes every file, writes `manifest.json` and renames the
folder once: a reader sees a whole artifact or none, whatever was killed when. What is not part of the artifact
(log, events, the job) stands in `runs/<recipe>/logs/<stage>@<n>/`.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee import files
from cordee.errors import Fault, UserError, nearest

MANIFEST = "manifest.json"
REFERENCE = re.compile(r"(?P<recipe>[\w-]+)/(?P<stage>[\w-]+)@(?P<version>\d+)(?:/(?P<place>.+))?")
_FOLDER = re.compile(r"(?P<stage>[\w-]+)@(?P<version>\d+)(?P<partial>\.partial)?")


@dataclass(frozen=True)
class Artifact:
    """A published artifact and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """How recipes refer to it: `quickstart/base@1`."""
        return f"{self.manifest['recipe']}/{self.manifest['stage']}@{self.manifest['version']}"

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the identity it was made under."""
        return str(self.manifest["fingerprint"])

    def holds(self, place: str) -> bool:
        """Whether a file or folder is part of it, whatever lies in its folder besides."""
        return any(_is_below(item["path"], place) for item in self.manifest["files"])

    def at(self, place: str, *, file: object = None, key: str | None = None) -> Path:
        """The path of a place in it.

        Raises:
            UserError: it holds no such place.
        """
        if not self.holds(place):
            paths = [Path(item["path"]) for item in self.manifest["files"]]
            known = {str(parent) for path in paths for parent in [path, *path.parents] if str(parent) != "."}
            raise UserError(f"{self.name} has no {place!r}", file=file, key=key, hint=nearest(place, known))
        return self.path / place


@dataclass(frozen=True)
class Store:
    """The folder that holds all recipes' artifacts (`runs/`)."""

    root: Path

    def __post_init__(self) -> None:
        """See that it can be one.

        Raises:
            UserError: it is a file.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UserError("is a file, not a folder of artifacts", file=self.root, key="--runs")

    def recipes(self) -> list[str]:
        """The recipes that have a folder here."""
        return sorted(path.name for path in self.root.iterdir() if path.is_dir()) if self.root.is_dir() else []

    def artifacts(self, recipe: str) -> Iterator[Artifact]:
        """The published artifacts of a recipe, by stage and version."""
        for stage, version, partial, path in self._folders(recipe):
            if not partial and (path / MANIFEST).exists():
                manifest = files.read_json(path / MANIFEST)
                if (manifest.get("stage"), manifest.get("version")) != (stage, version):
                    raise Fault("belongs to another artifact: was the folder renamed?", file=path / MANIFEST)
                yield Artifact(path, manifest)

    def everything(self, recipe: str) -> list[Artifact]:
        """All published artifacts, those of this recipe first."""
        others = [other for other in self.recipes() if other != recipe]
        return [artifact for name in [recipe, *others] for artifact in self.artifacts(name)]

    def open(self, reference: str) -> Artifact:
        """The artifact that `recipe/stage@n` names.

        Raises:
            UserError: there is none.
        """
        match = REFERENCE.fullmatch(reference)
        if not match:
            raise UserError(f"{reference!r} names no artifact", hint="an artifact is named recipe/stage@version")
        for artifact in self.artifacts(match["recipe"]):
            if artifact.name == reference.partition(f"@{match['version']}")[0] + f"@{match['version']}":
                return artifact
        known = [artifact.name for artifact in self.everything(match["recipe"])]
        raise UserError(f"no artifact {reference!r}", file=self.root, hint=nearest(reference, known))

    def work_folders(self, recipe: str, stage: str, fingerprint: str) -> "Work":
        """Where a stage with this fingerprint is worked on: what an earlier run left, or the next free version."""
        taken = [0]
        for name, version, partial, path in self._folders(recipe):
            if name == stage:
                taken.append(version)
                job = Work(path, self.root / recipe / "logs" / f"{stage}@{version}").job
                if partial and job.exists() and files.read_json(job)["fingerprint"] == fingerprint:
                    return Work(path, job.parent)
        number = max(taken) + 1
        base = self.root / recipe
        return Work(base / f"{stage}@{number}.partial", base / "logs" / f"{stage}@{number}")

    def _folders(self, recipe: str) -> Iterator[tuple[str, int, bool, Path]]:
        """The artifact folders of a recipe, finished and partial: stage, version, whether partial, path."""
        folder = self.root / recipe
        found = [(_FOLDER.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
        for match, path in sorted(((m, p) for m, p in found if m), key=lambda x: (x[0]["stage"], int(x[0]["version"]))):
            yield match["stage"], int(match["version"]), bool(match["partial"]), path


@dataclass(frozen=True)
class Work:
    """The two folders of a stage that is being worked on."""

    out: Path
    """`<stage>@<n>.partial`: becomes the artifact."""
    logs: Path
    """`logs/<stage>@<n>`: log, events, job and result."""

    @property
    def job(self) -> Path:
        """What the stage's process is told."""
        return self.logs / "job.json"

    @property
    def version(self) -> int:
        """The artifact's number."""
        return int(self.logs.name.rpartition("@")[2])


def around(path: Path) -> tuple[Artifact, str] | None:
    """The artifact that a path leads into, and the place in it; None if it leads into none."""
    whole = path.resolve()
    for folder in [whole, *whole.parents]:
        if _FOLDER.fullmatch(folder.name) and (folder / MANIFEST).exists():
            return Artifact(folder, files.read_json(folder / MANIFEST)), "/".join(whole.relative_to(folder).parts)
    return None


def publish(work: Work, manifest: dict[str, Any]) -> Artifact:
    """Make a stage's folder an artifact: flush, hash, write the manifest, rename once.

    Raises:
        Fault: the folder is empty or the version was published meanwhile.
    """
    final = work.out.with_name(work.out.name.removesuffix(".partial"))
    if final.exists():
        raise Fault("was published by another run meanwhile", file=final)
    (work.out / MANIFEST).unlink(missing_ok=True)
    for left in work.out.rglob(".*.tmp"):  # what a kill left in the midst of `files.write_text`
        left.unlink()
    mask = os.umask(0)
    os.umask(mask)
    for path in files.walk(work.out):
        path.chmod(0o666 & ~mask)  # safetensors writes for its owner alone
    listed = [
        {"path": path.relative_to(work.out).as_posix(), "bytes": path.stat().st_size, "sha256": files.sha256(path)}
        for path in files.walk(work.out)
    ]
    if not listed:
        raise Fault("the stage wrote nothing", file=work.out)
    files.sync_tree(work.out)
    whole = {"schema": 1, **manifest, "version": work.version, "files": listed}
    files.write_json(work.out / MANIFEST, whole)
    work.out.rename(final)
    files.sync_folder(final.parent)
    return Artifact(final, whole)


def verify(artifact: Artifact, place: str = "") -> Iterator[str]:
    """Hash an artifact's files again (those below `place`) and say what differs from the manifest, line by line."""
    root = artifact.path / place
    if not artifact.holds(place):
        yield f"{root}: is not in the manifest"
        return
    listed = {item["path"]: item for item in artifact.manifest["files"] if _is_below(item["path"], place)}
    for name, item in listed.items():
        path = artifact.path / name
        if not path.is_file():
            yield f"{path}: is missing"
        elif path.stat().st_size != item["bytes"]:
            yield f"{path}: has {path.stat().st_size} bytes, the manifest says {item['bytes']}"
        elif files.sha256(path) != item["sha256"]:
            yield f"{path}: its content differs from the manifest's SHA-256"
    for path in files.walk(root):
        name = path.relative_to(artifact.path).as_posix()
        if name not in listed and name != MANIFEST:
            yield f"{path}: is not in the manifest"


def _is_below(path: str, place: str) -> bool:
    """Whether a file is the place itself or stands below it."""
    return not place or path == place or path.startswith(f"{place}/")
