"""What a store holds that no run will use again: attempts that no plan continues, their logs, locks of the dead.

`find` lists it and deletes nothing. What can be resumed, and what is damaged, is listed as kept.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cordee import lock, plan, prove, recipe
from cordee.artifact import Artifact, Damaged, Store
from cordee.errors import CordeeError
from cordee.recipe import Recipe
from cordee.work import Work

UNUSED_CACHE_S = 30 * 24 * 3600.0
"""A cached file that was not read or written for so long is deleted."""
UNFINISHED_S = 3600.0
"""A file that was left unfinished by a kill is deleted once it is so old."""


@dataclass(frozen=True)
class Item:
    """One file or folder."""

    path: Path
    why: str
    """Why it is deleted, or kept."""
    is_kept: bool = False
    lock: Path | None = None
    """The lock to hold while it is deleted."""

    @property
    def size_bytes(self) -> int:
        """The bytes of its files."""
        paths = [self.path, *self.path.rglob("*")] if self.path.is_dir() and not self.path.is_symlink() else [self.path]
        return sum(path.lstat().st_size for path in paths if path.is_symlink() or path.is_file())


def find(store: Store, of: Recipe | None) -> list[Item]:
    """What can be deleted in a recipe's folder; without a recipe, in all."""
    found = store.scan()
    if of:
        return list(_in_recipe(store, of.name, of, found))
    names = sorted(path.name for path in store.root.glob("[!.]*") if path.is_dir())
    items = [item for name in names for item in _in_recipe(store, name, None, found)]
    return [*items, *_caches(store.cache), *_unfinished(store.root)]


def delete(item: Item) -> None:
    """Delete a file or folder.

    Raises:
        Fault: a run holds its stage.
    """
    with lock.hold(item.lock) if item.lock else contextlib.nullcontext():
        if item.path.is_dir() and not item.path.is_symlink():
            shutil.rmtree(item.path)
        elif item.path != item.lock:  # a lock is taken over, and so gone in the end
            item.path.unlink(missing_ok=True)


def _in_recipe(store: Store, name: str, of: Recipe | None, found: list[Artifact | Damaged]) -> Iterator[Item]:
    """What can be deleted, and what is kept, in one recipe's folder."""
    folder = store.root / name
    yield from _attempts(store, name, of, {one.fingerprint: one.name for one in found if isinstance(one, Artifact)})
    for path in sorted((folder / "logs").glob("*@*")):
        if not (folder / path.name).exists() and not (folder / f"{path.name}.partial").exists():
            yield Item(path, "log of an attempt that is gone", lock=store.lock_file(name, path.name.rpartition("@")[0]))
    for path in sorted([*folder.glob(".*.lock"), *folder.glob(".*.lock.dead.*")]):
        if not lock.is_held(path):
            yield Item(path, "lock of a process that has ended", lock=path if path.suffix == ".lock" else None)
    yield from _unfinished(folder)
    yield from _unfinished(folder / "logs")
    for one in found:
        if isinstance(one, Damaged) and one.path.parent == folder:
            yield Item(one.path, one.problem, is_kept=True)


def _attempts(store: Store, name: str, of: Recipe | None, published: Mapping[str, str]) -> Iterator[Item]:
    """The attempts that published nothing, and their logs; `published` has an artifact's name for each fingerprint."""
    attempts = store.attempts(name)
    wanted, unknown = _wanted(store, name, of, {work.fingerprint for work in attempts})
    for work in attempts:
        held, fingerprint = store.lock_file(name, work.stage), work.fingerprint
        if lock.is_held(held):
            yield Item(work.out, "a run holds its stage", is_kept=True)
        elif fingerprint is None:
            yield from _with_log(work, "has no job that could be continued", held)
        elif fingerprint in published:
            yield from _with_log(work, f"is published as {published[fingerprint]}", held)
        elif fingerprint in wanted:
            yield Item(work.out, "can be resumed", is_kept=True)
        elif unknown:
            yield Item(work.out, unknown, is_kept=True)
        else:
            yield from _with_log(work, "no stage has its fingerprint now", held)


def _with_log(work: Work, why: str, held: Path) -> Iterator[Item]:
    """The log goes first: without the job in it, no run continues a folder that is deleted in part."""
    if work.logs.exists():
        yield Item(work.logs, "its log", lock=held)
    yield Item(work.out, why, lock=held)


def _wanted(store: Store, name: str, of: Recipe | None, attempts: set[str | None]) -> tuple[set[str], str]:
    """The fingerprints that a run would continue, and why they may not be all.

    Every recipe that was run here counts, each with its overrides, and the one that is given, with its proofs.
    """
    stored = sorted((store.root / name / "logs").glob("*.recipe.yaml"), reverse=True)
    distinct = {path.read_bytes(): path for path in reversed(stored)} if attempts else {}
    wanted = _fingerprints(of, store) if of else set()
    unknown = "" if of or distinct else "no recipe was stored here; name it: cordee clean RECIPE"
    for path in distinct.values():
        if attempts <= wanted:
            break
        try:
            wanted |= {planned.fingerprint for planned in plan.make(recipe.load(path), store).stages}
        except CordeeError as error:
            unknown = f"a recipe that was run here can't be planned: {error}"
    return wanted, unknown


def _fingerprints(of: Recipe, store: Store) -> set[str]:
    """The fingerprints that a run or a proof of a recipe would continue."""
    plans = [plan.make(of, store)]
    used = {item.stage.uses for item in of.stages}
    for proof in prove.find().values():
        if proof.proves in used:
            plans += [with_proof for with_proof, _ in prove.plans(of, store, proof.name)]
    return {planned.fingerprint for one in plans for planned in one.stages}


def _unfinished(folder: Path) -> Iterator[Item]:
    """Files that a kill left within `files.write_text`."""
    for path in sorted(folder.glob(".*.tmp")):
        if time.time() - path.stat().st_mtime > UNFINISHED_S:
            yield Item(path, "was not finished")


def _caches(folder: Path) -> Iterator[Item]:
    """Caches that no stage has used for a while."""
    apart = [
        folder / name for name in ("sequences", "answers", "reference_logprobs")
    ]  # each source's and model's is used or not by itself
    others = [path for path in sorted(folder.glob("*")) if path not in apart]
    for path in [*others, *(path for parent in apart for path in sorted(parent.glob("*")))]:
        states = [inner.stat() for inner in [path, *path.rglob("*")] if inner.exists()]
        used = max(max(state.st_mtime, state.st_atime if not path.is_dir() else 0.0) for state in states)
        if time.time() - used > UNUSED_CACHE_S:
            yield Item(path, f"cache not used for {(time.time() - used) / 86400:.0f} days")
