"""From a checkpoint back to the source files and licences that it comes from."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from cordee import artifact, files, manifest
from cordee.artifact import REFERENCE, Artifact, Damaged, Store
from cordee.errors import UserError

CORPUS = "corpus.json"
"""Holds a corpus's licences."""


@dataclass(frozen=True)
class Step:
    """One step on the way back: an artifact, a source file, or an artifact that can't be read."""

    depth: int
    key: str
    """The key of the input that it was read as."""
    artifact: Artifact | None
    name: str = ""
    """Of a file, its path as the manifest has it; of an artifact that can't be read, its name."""
    sha256: str = ""
    """Of a source file."""
    problem: str = ""
    """Why an artifact can't be read; empty for a file."""


def walk(of: Artifact, store: Store, apart: Collection[str] = ()) -> Iterator[Step]:
    """An artifact, then everything it was made from, depth first; what two steps share is expanded at the first.

    Inputs whose key is, or begins with, one of `apart` are left out.
    """
    yield from _walk(of, store, Step(0, "", of), apart, set())


def _walk(of: Artifact, store: Store, step: Step, apart: Collection[str], seen: set[str]) -> Iterator[Step]:
    yield step
    if of.name in seen:
        return
    seen.add(of.name)
    depth = step.depth
    for read in of.manifest.inputs:
        if read.key.partition(".")[0] in apart:
            continue
        if not read.artifact:
            yield Step(depth + 1, read.key, None, read.file, read.sha256)
            continue
        found = _find(read, store)
        if isinstance(found, Artifact):
            yield from _walk(found, store, Step(depth + 1, read.key, found), apart, seen)
        else:
            yield Step(depth + 1, read.key, None, read.artifact, problem=found)


def _find(read: manifest.Read, store: Store) -> Artifact | str:
    """The artifact that a stage read, or why it can't be read now."""
    try:
        found = store.find(read.artifact)
    except UserError:
        return "is not in the store any more"
    if isinstance(found, Damaged):
        return found.problem
    return found if found.fingerprint == read.fingerprint else "is another artifact than the one that was read"


def licences(of: Artifact) -> Iterator[str]:
    """The documents of a corpus per licence, a line each; nothing for any other artifact."""
    if not of.holds(CORPUS):
        return
    if damage := next(artifact.verify(of, CORPUS), None):
        yield f"licences unknown: {damage}"
        return
    found = files.read_json(of.path / CORPUS)
    known = found.get("licences") if isinstance(found, dict) else None
    for name, count in known.items() if isinstance(known, dict) else ():
        yield f"licence: {name} ({count:,} documents)" if isinstance(count, int) else f"licence: {name}"


def place(what: str, store: Store) -> Path:
    """The folder that a path, or a reference to an artifact or to a place in one, names.

    Raises:
        UserError: there is none.
        Fault: the artifact is damaged.
    """
    match = REFERENCE.fullmatch(what)
    if match and not Path(what).exists():
        found = store.find(what)
        if isinstance(found, Damaged):
            raise found.fault()
        return found.at(match["place"] or "", file="command line", key=what)
    if not Path(what).is_dir():
        raise UserError(f"no folder {what!r}", file="command line", hint="name an artifact as recipe/stage@version")
    return Path(what)


def find(what: str, store: Store) -> Artifact | Damaged:
    """The artifact that a reference or a path (of a checkpoint, of any file inside) names.

    Raises:
        UserError: it is neither.
    """
    path = Path(what)
    if REFERENCE.fullmatch(what) and not path.exists():
        return store.find(what)
    folder = manifest.around(path)
    found = store.around(path) or (Store(folder.parent.parent).around(path) if folder else None)
    if found is None:
        raise UserError(f"{what!r} lies in no artifact", hint="name one as recipe/stage@version, or a path inside one")
    return found[0]
