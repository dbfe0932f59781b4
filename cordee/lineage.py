"""From a checkpoint back to the source files and licences that it comes from."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cordee import files
from cordee.artifact import REFERENCE, Artifact, Store, around
from cordee.errors import UserError


@dataclass(frozen=True)
class Step:
    """One step on the way back."""

    depth: int
    key: str
    """The input that it was read as."""
    artifact: Artifact | None
    file: str = ""
    """For a source file: its path and hash as the manifest has them."""
    sha256: str = ""


def walk(artifact: Artifact, store: Store, depth: int = 0, key: str = "") -> Iterator[Step]:
    """An artifact, then all that it was made from, depth first; what two steps share is shown at the first."""
    yield from _walk(artifact, store, depth, key, set())


def _walk(artifact: Artifact, store: Store, depth: int, key: str, seen: set[str]) -> Iterator[Step]:
    yield Step(depth, key, artifact)
    if artifact.name in seen:
        return
    seen.add(artifact.name)
    for source in artifact.manifest["inputs"]:
        if "artifact" in source:
            yield from _walk(store.open(source["artifact"]), store, depth + 1, source["key"], seen)
        else:
            yield Step(depth + 1, source["key"], None, source["file"], source["sha256"])


def licences(artifact: Artifact) -> dict[str, int]:
    """The licences in a corpus and how many documents stand under each; empty for any other artifact."""
    path = artifact.path / "corpus.json"
    return dict(files.read_json(path)["licences"]) if path.exists() else {}


def find(what: str, store: Store) -> Artifact:
    """The artifact that a reference or a path (of a checkpoint, of any file inside) names.

    Raises:
        UserError: it is neither.
    """
    if REFERENCE.fullmatch(what) and not Path(what).exists():
        return store.open(what)
    if found := around(Path(what)):
        return found[0]
    raise UserError(f"{what!r} lies in no artifact", hint="name one as recipe/stage@version, or a path inside one")
