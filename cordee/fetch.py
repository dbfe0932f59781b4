"""Fetches what a recipe refers to on the hub, and writes its lock: the only module that uses a network.

Each file is compared with the hub's own listing: by SHA-256, or by git's hash where the hub has no other. What has come
stays, also when something else fails, and is not fetched again.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import httpx
from huggingface_hub import HfApi, errors, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from cordee import files, hub, units
from cordee.config import inputs
from cordee.data import hub as headers
from cordee.errors import CordeeError, Fault, UserError, from_system
from cordee.hub import DataSet, Entry, File, Lock, Reads, Reference
from cordee.recipe import Recipe

Commits = dict[tuple[str, str, str], str]
"""The commit of each repository and revision."""
AGAIN = "what has come stays: run it again"
_REFUSALS = (  # the first that fits: one is a kind of the next
    (
        errors.GatedRepoError,
        "is gated: its owner has not given access",
        "ask for it on its page of the hub, and set HF_TOKEN to a token of yours",
    ),
    (
        errors.RepositoryNotFoundError,
        "is not on the hub, or HF_TOKEN gives no access to it",
        "a model is hub:owner/name, a data set hub:datasets/owner/name",
    ),
    (
        errors.RevisionNotFoundError,
        "has no such revision",
        "its page of the hub lists them; `--update` replaces a commit of the lock that is gone",
    ),
    (errors.DisabledRepoError, "is disabled on the hub", ""),
    (errors.HFValidationError, "is no name that the hub has", ""),
)


@dataclass(frozen=True)
class Wanted:
    """One reference of a recipe."""

    reference: Reference
    key: str
    """The first key that holds it."""
    reads: Reads | None
    """What is read of a data set; None: all of it."""


def run(
    recipe: Recipe, to: Path | None, hash_file: Callable[[Path], str], say: Callable[[str], None], *, update: bool
) -> list[UserError]:
    """Fetch all references of a recipe, each with the commit that the lock names for it, if any.

    Args:
        recipe: the recipe, beside whose file the lock is written after each reference.
        to: a folder; without it, that of the lock or, where there is none, the cache of huggingface_hub.
        hash_file: gives a file's SHA-256.
        say: is given a line for each reference that is there.
        update: whether the newest commits are taken, not those of the lock.

    Returns:
        What is wrong with references that could not be fetched; all others were.

    Raises:
        Fault: the hub can't be reached, a transfer broke off, or the disk is full.
    """
    lock = hub.read(recipe.file)
    lock = lock.model_copy(update={"folder": str(to) if to else lock.folder})
    all_wanted, failed = _wanted(recipe), []
    commits = {} if update else _locked(all_wanted, lock, hub.lock_file(recipe.file))
    for wanted in all_wanted:
        try:
            entry = _fetch(wanted, lock, commits, hash_file)
        except CordeeError as error:
            placed = error.in_stage(recipe.file, wanted.key, ())
            if not isinstance(placed, UserError):
                raise placed from error
            failed.append(placed)
            continue
        lock = lock.model_copy(update={"references": {**lock.references, wanted.reference.text: entry}})
        hub.write(recipe.file, lock)
        size, count = units.size(sum(file.bytes for file in entry.files.values())), len(entry.files)
        told = f"commit {entry.commit[:8]}, {count} file{'s' if count > 1 else ''}, {size}"
        say(f"{wanted.reference.text}: {told}, in {wanted.reference.folder(entry.commit, lock.folder)}")
    return failed


def _locked(all_wanted: list[Wanted], lock: Lock, file: Path) -> Commits:
    """The commits that a lock has for what is wanted: all references to one repository and revision have one."""
    wanted = {one.reference.text: one.reference.repository for one in all_wanted}
    entries = sorted(lock.references.items(), key=lambda item: item[0] in wanted)  # those that are not wanted are old
    found = {hub.parse(text, file, "references").repository: entry.commit for text, entry in entries}
    return {repository: found[repository] for repository in wanted.values() if repository in found}


def _wanted(recipe: Recipe) -> list[Wanted]:
    """The references of a recipe; of one that stands at several keys, all that is read of it.

    Raises:
        UserError: there are none, or something is no reference.
    """
    found: dict[str, Wanted] = {}
    for item in recipe.stages:
        for place, value in inputs(item.config):
            if not hub.is_reference(value):
                continue
            key, reads = f"stages.{item.name}.{place}", value.reads if isinstance(value, DataSet) else None
            if earlier := found.get(str(value)):
                reads = None if reads is None or earlier.reads is None else reads | earlier.reads
                key = earlier.key
            found[str(value)] = Wanted(hub.parse(str(value), recipe.file, key), key, reads)
    if not found:
        raise UserError("refers to nothing on the hub", file=recipe.file, hint=hub.FORM)
    return list(found.values())


def _fetch(wanted: Wanted, lock: Lock, commits: Commits, hash_file: Callable[[Path], str]) -> Entry:
    """Fetch one reference, unless its files are there as the lock has them; the commit is added to `commits`.

    Raises:
        UserError: it can't be had.
        Fault: the transfer failed.
    """
    reference, earlier = wanted.reference, lock.references.get(wanted.reference.text)
    with _explained(reference):
        commit = commits.get(reference.repository)
        if commit is None:
            commit = HfApi().repo_info(reference.name, repo_type=reference.kind, revision=reference.revision).sha or ""
        commits[reference.repository] = commit
        if lock.folder is not None:
            _require_one_commit(reference, commits)
        reads = _as_listed(wanted.reads)
        is_same = earlier is not None and (earlier.commit, earlier.reads) == (commit, reads)
        if earlier and is_same and not hub.damage(reference, earlier, lock.folder, hash_file):
            return earlier
        tree = HfApi().list_repo_tree(reference.name, recursive=True, revision=commit, repo_type=reference.kind)
        listed = {item.path: item for item in tree if isinstance(item, RepoFile)}
        _require_inside(reference, listed)
        names = _chosen(reference, listed)
        folder, fetched = reference.folder(commit, lock.folder), {}
        if wanted.reads is not None and "README.md" in names:
            fetched["README.md"] = _file(reference, listed["README.md"], commit, lock.folder, hash_file)
            names = _of_subsets(folder, names, wanted.reads)
        _require_space(folder, [listed[name] for name in names])
        for name in names:
            fetched[name] = _file(reference, listed[name], commit, lock.folder, hash_file)
    entry = Entry(commit=commit, reads=reads, files=fetched)
    if earlier and lock.folder is not None:
        _remove(folder, earlier, listed, hash_file)
    if lock.folder is not None:  # notes of huggingface_hub, which are no part of the data
        shutil.rmtree(folder / ".cache", ignore_errors=True)
    if problem := hub.damage(reference, entry, lock.folder, hash_file):
        raise UserError(problem, file=folder, hint="delete it, or choose another folder: --to FOLDER")
    return entry


def _remove(folder: Path, earlier: Entry, listed: Mapping[str, RepoFile], hash_file: Callable[[Path], str]) -> None:
    """Remove the files of an earlier commit that the repository has no more, unless they were changed since."""
    for name, told in earlier.files.items():
        if name not in listed and (folder / name).is_file() and hash_file(folder / name) == told.sha256:
            (folder / name).unlink()


def _require_one_commit(reference: Reference, commits: Commits) -> None:
    """See that a recipe names one revision of a repository, as a folder holds no more.

    Raises:
        UserError: it names several.
    """
    held = {one for (kind, name, _), one in commits.items() if (kind, name) == (reference.kind, reference.name)}
    if len(held) > 1:
        hint = "fetch into the cache of huggingface_hub: without --to, and without a lock that names a folder"
        raise UserError(f"{reference.text}: a folder holds one commit of a repository, not several", hint=hint)


def _as_listed(reads: Reads | None) -> list[tuple[str | None, list[str]]] | None:
    """What is read of a data set, as the lock has it."""
    if reads is None:
        return None
    return [(name, list(patterns)) for name, patterns in sorted(reads, key=lambda read: (read[0] or "", read[1]))]


def _chosen(reference: Reference, listed: Mapping[str, RepoFile]) -> list[str]:
    """The files of a repository that a reference reads.

    Raises:
        UserError: there are none, or a model's weights would have to be unpickled.
    """
    names = reference.takes(listed)
    if not names:
        what = f"no {reference.place}" if reference.place else "nothing"
        raise UserError(f"{reference.text} holds {what} that is fetched", hint=_beside(listed))
    start = f"{reference.place}/" if reference.place else ""
    pickled = [name for name in listed if name.startswith(start) and name.endswith(hub.PICKLED)]
    is_model = reference.kind == "model" and names != [reference.place]
    if is_model and pickled and not any(name.endswith(".safetensors") for name in names):
        problem = f"{reference.text} has no safetensors; {pickled[0]} would have to be unpickled, and is not fetched"
        raise UserError(problem, hint="another revision, or a copy, may have them")
    return names


def _require_inside(reference: Reference, names: Iterable[str]) -> None:
    """See that all files of a repository lie in it, as git has it, whatever answers in the place of the hub.

    Raises:
        Fault: one does not.
    """
    for name in names:
        try:
            files.inside(name)
        except ValueError as error:
            raise Fault(f"{reference.text}: the hub lists a file that is none: {error}") from error


def _beside(listed: Mapping[str, RepoFile]) -> str:
    names = sorted(listed)
    return f"it holds {', '.join(names[:6])}{', …' if len(names) > 6 else ''}" if names else "it is empty"


def _of_subsets(folder: Path, names: list[str], reads: Reads) -> list[str]:
    """The files of the subsets that are read; all files, where the header of `README.md` does not tell."""
    chosen = {"README.md"}
    for subset, patterns in reads:
        told = patterns or headers.patterns(folder, subset)
        found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in told)]
        if not found:
            return names
        chosen.update(found)
    return [name for name in names if name in chosen]


def _require_space(folder: Path, files: list[RepoFile]) -> None:
    """See that the disk has space for the files that are not there yet."""
    needed = sum(file.size for file in files if not (folder / file.path).is_file())
    disk = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if needed > (free := shutil.disk_usage(disk).free):
        problem = f"no space left on the disk: {units.size(needed)} are to come, {units.size(free)} are free"
        raise Fault(problem, file=disk, hint="free some, or choose another folder: --to FOLDER")


def _file(reference: Reference, item: RepoFile, commit: str, to: str | None, hash_file: Callable[[Path], str]) -> File:
    """Fetch one file, unless it is there; what is not as the hub lists it is fetched once more.

    Raises:
        Fault: it came damaged again.
    """
    place = reference.folder(commit, to) if to is not None else None
    for _ in range(2):
        path = Path(
            hf_hub_download(reference.name, item.path, repo_type=reference.kind, revision=commit, local_dir=place)
        )
        found = hash_file(path)
        if _is_whole(path, item, found):
            return File(bytes=item.size, sha256=found)
        path.resolve().unlink()  # in the cache, the name of a file is a link to it
        path.unlink(missing_ok=True)
    problem = f"broken transfer: {item.path} came twice with another content than the hub lists"
    raise Fault(problem, key=reference.text, hint=AGAIN)


def _is_whole(path: Path, item: RepoFile, sha256: str) -> bool:
    """Whether a file has the size and the hash that the hub lists."""
    if path.stat().st_size != item.size:
        return False
    if item.lfs:
        return sha256 == item.lfs.sha256
    content = path.read_bytes()  # what is not in LFS is small
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == item.blob_id


@contextlib.contextmanager
def _explained(reference: Reference) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    try:
        yield
    except CordeeError:
        raise
    except (httpx.HTTPError, OSError, errors.XetDownloadError, ValueError) as error:
        raise _error(reference, error) from error


def _error(reference: Reference, error: BaseException) -> CordeeError:
    """An error of huggingface_hub in the project's words."""
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    text = reference.text
    for kind, problem, hint in _REFUSALS:
        if isinstance(error, kind):
            return UserError(f"{text} {problem}", hint=hint)
    if isinstance(error, errors.HfHubHTTPError):
        return Fault(f"{text}: the hub answered {error.response.status_code}", hint=AGAIN)
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Fault(f"{text}: the hub can't be reached: {error}", hint="is there a network, or a proxy to set?")
    if isinstance(error, OSError) and error.errno is not None:
        return from_system(error)
    return Fault(f"{text}: broken transfer: {error}", hint=AGAIN)
