"""Artifacts: the folders that stages have published, `runs/<recipe>/<stage>@<n>`: complete, hashed, never changed.

A stage writes into `<stage>@<n>.partial`. Publishing flushes every file, writes `manifest.json` and renames the
folder once: a reader sees a complete artifact or none, whenever the process is killed. Log, events and job of the
attempts are no part of the artifact; they are kept in `runs/<recipe>/logs/<stage>@<n>/`.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cordee import files, hashes, manifest
from cordee.errors import Fault, UserError, nearest
from cordee.manifest import Manifest
from cordee.work import Work

REFERENCE = re.compile(r"(?P<recipe>[\w-]+)/(?P<folder>[\w-]+@\d+)(?:/(?P<place>.+))?")
_FOLDER = re.compile(r"(?P<stage>[\w-]+)@(?P<version>\d+)(?P<partial>\.partial)?")


@dataclass(frozen=True)
class Artifact:
    """A published artifact and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """How recipes refer to it: `quickstart/base@1`."""
        return self.manifest.name

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the identity of its stage."""
        return self.manifest.fingerprint

    def holds(self, place: str) -> bool:
        """Whether the manifest lists a file at a place or below it."""
        return any(_is_below(item.path, place) for item in self.manifest.files)

    def at(self, place: str, *, file: object = None, key: str | None = None) -> Path:
        """The path of a place in it.

        Raises:
            UserError: it holds no such place.
        """
        if not self.holds(place):
            paths = [Path(item.path) for item in self.manifest.files]
            known = {str(parent) for path in paths for parent in [path, *path.parents] if str(parent) != "."}
            raise UserError(f"{self.name} has no {place!r}", file=file, key=key, hint=nearest(place, known))
        return self.path / place


@dataclass(frozen=True)
class Damaged:
    """A folder that is named as an artifact and has no manifest that can be used: it counts as not made."""

    path: Path
    problem: str
    """What is wrong, to be read after the name: `manifest.json is missing`."""

    @property
    def name(self) -> str:
        """Its recipe and its version, by its folder: `quickstart/base@1`."""
        return f"{self.path.parent.name}/{self.path.name}"

    def is_of(self, recipe: str, stage: str) -> bool:
        """Whether it is, by its folder, a version of a stage."""
        return (self.path.parent.name, self.path.name.rpartition("@")[0]) == (recipe, stage)

    def fault(self, *, file: object = None, key: str | None = None) -> Fault:
        """The error where this artifact and no other was asked for."""
        return Fault(f"{self.name}: {self.problem}", file=file, key=key, hint="run its recipe to make it anew")


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

    def scan(self, first: str = "") -> list[Artifact | Damaged]:
        """Everything that was published, by recipe, stage and version; the recipe `first` before the others."""
        names = [path.name for path in self.root.iterdir() if path.is_dir()] if self.root.is_dir() else []
        ordered = sorted(names, key=lambda name: (name != first, name))
        return [self._read(path) for name in ordered for _, _, partial, path in self._folders(name) if not partial]

    def find(self, reference: str) -> Artifact | Damaged:
        """What the folder that `recipe/stage@n` names holds.

        Raises:
            UserError: there is no such folder.
        """
        match = REFERENCE.fullmatch(reference)
        if not match:
            raise UserError(f"{reference!r} names no artifact", hint="an artifact is named recipe/stage@version")
        path = self.root / match["recipe"] / match["folder"]
        if path.exists():
            return self._read(path)
        known = [found.name for found in self.scan(match["recipe"])]
        raise UserError(f"no artifact {reference!r}", file=self.root, hint=nearest(reference, known))

    def around(self, path: Path) -> tuple[Artifact | Damaged, str] | None:
        """The artifact of this store that a path leads into, and the place in it; None if it leads into none."""
        whole, root = path.resolve(), self.root.resolve()
        recipe, folder, *inside = (*whole.relative_to(root).parts, "", "") if whole.is_relative_to(root) else ("", "")
        match = _FOLDER.fullmatch(folder)
        if not match or match["partial"]:
            return None
        return self._read(self.root / recipe / folder), "/".join(filter(None, inside))

    def work_folders(self, recipe: str, stage: str, fingerprint: str) -> Work:
        """Where a stage with this fingerprint is worked on.

        An interrupted attempt at the same fingerprint is continued. Otherwise it is the first number after the newest
        published version at which no other attempt has left files.
        """
        for work in self.attempts(recipe):
            if work.stage == stage and work.fingerprint == fingerprint:
                return work
        number = 1 + max(
            (n for name, n, partial, _ in self._folders(recipe) if name == stage and not partial), default=0
        )
        while (work := self._work(recipe, stage, number)).has_files():
            number += 1
        return work

    def attempts(self, recipe: str) -> list[Work]:
        """The attempts at a recipe's stages that were begun and not published."""
        return [self._work(recipe, stage, version) for stage, version, partial, _ in self._folders(recipe) if partial]

    @property
    def hashes(self) -> Path:
        """Keeps the hashes of files outside the store."""
        return self.root / ".hashes.json"

    @property
    def cache(self) -> Path:
        """Keeps what only makes a start faster, such as compiled code."""
        return self.root / ".cache"

    def lock_file(self, recipe: str, stage: str) -> Path:
        """The lock that whoever works on a stage holds."""
        return self.root / recipe / f".{stage}.lock"

    def _work(self, recipe: str, stage: str, version: int) -> Work:
        """The folders in which one version of a stage is worked on."""
        base = self.root / recipe
        return Work(base / f"{stage}@{version}.partial", base / "logs" / f"{stage}@{version}")

    def _read(self, path: Path) -> Artifact | Damaged:
        """The artifact in a folder of this store."""
        try:
            found = manifest.read(path)
        except Fault as error:
            where = f"{manifest.NAME}: {error.key}:" if error.key else manifest.NAME
            return Damaged(path, f"{where} {error.problem}")
        if found.name != f"{path.parent.name}/{path.name}":
            return Damaged(path, f"is {found.name} by its manifest: was the folder renamed?")
        return Artifact(path, found)

    def _folders(self, recipe: str) -> Iterator[tuple[str, int, bool, Path]]:
        """The artifact folders of a recipe, finished and partial: stage, version, whether partial, path."""
        folder = self.root / recipe
        found = [(_FOLDER.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
        for match, path in sorted(((m, p) for m, p in found if m), key=lambda x: (x[0]["stage"], int(x[0]["version"]))):
            yield match["stage"], int(match["version"]), bool(match["partial"]), path


def publish(work: Work, draft: Manifest) -> Artifact:
    """Make a stage's folder an artifact: flush, hash, write the manifest, rename once.

    Args:
        work: the stage's folders.
        draft: the manifest; its version and its files are filled in here.

    Raises:
        Fault: the folder is empty or holds a link, or the version was published meanwhile.
    """
    final = work.out.with_name(work.out.name.removesuffix(".partial"))
    if final.exists():
        raise Fault("was published by another run meanwhile", file=final)
    (work.out / manifest.NAME).unlink(missing_ok=True)
    for left in work.out.rglob(".*.tmp"):  # left by a kill within `files.write_text`
        left.unlink()
    if link := next((path for path in work.out.rglob("*") if path.is_symlink()), None):
        hint = "replace it by what it points to, or delete it, and run again"
        raise Fault("is a link, and an artifact holds its files itself", file=link, hint=hint)
    mask = os.umask(0)
    os.umask(mask)
    for path in files.walk(work.out):
        path.chmod(0o666 & ~mask)  # safetensors writes for its owner alone
    listed = tuple(
        manifest.File(
            path=path.relative_to(work.out).as_posix(), bytes=path.stat().st_size, sha256=hashes.of_file(path)
        )
        for path in files.walk(work.out)
    )
    if not listed:
        raise Fault("the stage wrote nothing", file=work.out)
    files.sync_tree(work.out)
    whole = draft.model_copy(update={"version": work.version, "files": listed})
    manifest.write(work.out, whole)
    work.out.rename(final)
    files.sync_folder(final.parent)
    hashes.moved(work.out, final)
    return Artifact(final, whole)


def verify(artifact: Artifact, place: str = "") -> Iterator[str]:
    """Hash an artifact's files (those below `place`) and compare them with the manifest: a line per difference."""
    root = artifact.path / place
    if not artifact.holds(place):
        yield f"{root}: is not in the manifest"
        return
    listed = {item.path: item for item in artifact.manifest.files if _is_below(item.path, place)}
    for name, item in listed.items():
        path = artifact.path / name
        try:
            if not path.is_file():
                yield f"{path}: is missing"
            elif path.stat().st_size != item.bytes:
                yield f"{path}: has {path.stat().st_size} bytes, the manifest says {item.bytes}"
            elif hashes.of_file(path) != item.sha256:
                yield f"{path}: its content differs from the manifest's SHA-256"
        except OSError as error:
            yield f"{path}: can't be read: {error.strerror}"
    for path in sorted(root.rglob("*")):
        name = path.relative_to(artifact.path).as_posix()
        if name not in listed and name != manifest.NAME and (path.is_symlink() or not path.is_dir()):
            yield f"{path}: is not in the manifest"


def _is_below(path: str, place: str) -> bool:
    """Whether a file is the place itself or below it."""
    return not place or path == place or path.startswith(f"{place}/")
