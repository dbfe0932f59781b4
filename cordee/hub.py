"""References to the hub, and the lock that says what they were when they were fetched. Nothing here uses a network.

A reference is `hub:owner/name` for a model and `hub:datasets/owner/name` for a data set, with `@revision` behind it,
and behind that a `/` and a file or folder in it. Beside `mine.yaml`, `mine.lock.json` holds for each reference its
commit, and the size and SHA-256 of each of its files. What is not locked is looked for in the cache of huggingface_hub.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal
from urllib.parse import unquote

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cordee import files
from cordee.config import Input
from cordee.errors import Fault, UserError

PREFIX = "hub:"
FORM = "write hub:owner/name or hub:datasets/owner/name, with @revision and /file behind it where needed"
_REFERENCE = re.compile(
    r"hub:(?P<data>datasets/)?(?P<name>\w[\w.-]*/\w[\w.-]*(?![\w.-])|\w[\w.-]*(?![\w./-]))"
    r"(?:@(?P<revision>[^@/]+))?(?:/(?P<place>.+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
OF_MODELS = (*files.MODEL_SUFFIXES, ".md")
"""The suffixes of a model's files that are fetched."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
"""The suffixes of what would have to be unpickled: nothing of that kind is fetched."""
NOT_FETCHED = (".py", *PICKLED)

Reads = frozenset[tuple[str | None, tuple[str, ...]]]
"""What is read of a data set: names of subsets (None: the default one), each with patterns of files where they are
given."""


class DataSet(Input):
    """A data set, by its reference, of which only some subsets are read."""

    reads: Reads | None = None
    """None: all of it."""


@dataclass(frozen=True)
class Reference:
    """What a reference says."""

    text: str
    kind: Literal["model", "dataset"]
    name: str
    """`owner/name`; some old data sets have no owner."""
    revision: str
    """A branch, a tag or a commit."""
    place: str
    """A file or folder in the repository; empty for all of it."""

    @property
    def repository(self) -> tuple[str, str, str]:
        """What has one commit."""
        return self.kind, self.name, self.revision

    def at(self, commit: str) -> str:
        """The reference with its commit in the place of its revision, for the record."""
        place = f"/{self.place}" if self.place else ""
        return f"{PREFIX}{'datasets/' if self.kind == 'dataset' else ''}{self.name}@{commit}{place}"

    def folder(self, commit: str, to: str | None) -> Path:
        """Where the repository lies: below the folder `to`, or in the cache of huggingface_hub."""
        if to is not None:
            return Path(to) / f"{self.kind}s" / self.name
        return self._cached() / "snapshots" / commit

    def cached_commit(self) -> str | None:
        """The commit that the cache of huggingface_hub has for the revision."""
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        ref = self._cached() / "refs" / self.revision
        return ref.read_text(encoding="utf-8").strip() if ref.is_file() else None

    def _cached(self) -> Path:
        home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
        cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
        return cache / f"{self.kind}s--{self.name.replace('/', '--')}"

    def takes(self, names: Iterable[str]) -> list[str]:
        """Which of a repository's files are read: of a model, those of one folder; of a data set, those below it."""
        listed = sorted(names)
        if self.place in listed:
            return [] if self.place.endswith(NOT_FETCHED) else [self.place]
        start = f"{self.place}/" if self.place else ""
        below = [name.removeprefix(start) for name in listed if name.startswith(start)]
        chosen = _of_model(below) if self.kind == "model" else [name for name in below if _is_data(name)]
        return [start + name for name in chosen]


def _of_model(names: list[str]) -> list[str]:
    """A model's files in one folder; of several sets of weights, the one that transformers opens."""
    own = [name for name in names if "/" not in name and (name.endswith(OF_MODELS) or name in ("LICENSE", "NOTICE"))]
    templates = [name for name in names if fnmatchcase(name, files.CHAT_TEMPLATES)]
    weights = [name for name in own if name.endswith(".safetensors")]
    opened = [name for name in weights if name.startswith("model")] or weights
    return [name for name in (*own, *templates) if name not in weights or name in opened]


def _is_data(name: str) -> bool:
    return not name.endswith(NOT_FETCHED) and not any(part[0] == "." for part in PurePosixPath(name).parts)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class File(_Part):
    """A file as it was fetched."""

    bytes: int
    sha256: str


class Entry(_Part):
    """A reference as it was fetched."""

    commit: Annotated[str, AfterValidator(files.inside)]
    reads: list[tuple[str | None, list[str]]] | None = None
    """The subsets of a data set that were fetched, each with patterns of files; None: all of it."""
    files: dict[Annotated[str, AfterValidator(files.inside)], File]
    """By their paths in the repository."""


class Lock(_Part):
    """What a recipe's references were when they were fetched."""

    folder: str | None = None
    """Where they lie, relative to the current folder; None: in the cache of huggingface_hub."""
    references: dict[str, Entry] = Field(default={})


@dataclass(frozen=True)
class Located:
    """Where a reference's files lie on this machine."""

    path: Path
    source: str
    """The reference with its commit."""
    files: tuple[str, ...] | None
    """The files of a folder that count, relative to it; None where `path` is a file."""


def is_reference(value: object) -> bool:
    """Whether an input is to be fetched from the hub."""
    return str(value).startswith(PREFIX)


def may_be_name(path: Path) -> bool:
    """Whether a path that is not there may be a name of the hub, `owner/name`."""
    return len(path.parts) == 2 and bool(_REFERENCE.fullmatch(f"{PREFIX}{path}")) and not path.suffix[1:].isalpha()


def parse(text: str, file: object, key: str) -> Reference:
    """Read a reference; `file` and `key` are where it stands.

    Raises:
        UserError: it is none.
    """
    found = _REFERENCE.fullmatch(text)
    revision = unquote(found["revision"] or "main") if found else ""
    if not found or ".." in (*PurePosixPath(found["place"] or "").parts, *PurePosixPath(revision).parts):
        raise UserError(f"{text!r} is no reference to the hub", file=file, key=key, hint=FORM)
    kind: Literal["model", "dataset"] = "dataset" if found["data"] else "model"
    return Reference(text, kind, found["name"], revision, found["place"] or "")


def lock_file(recipe: Path) -> Path:
    """Where a recipe's lock lies."""
    return recipe.with_suffix(".lock.json")


def read(recipe: Path) -> Lock:
    """A recipe's lock; an empty one where there is none.

    Raises:
        Fault: it can't be read.
    """
    file = lock_file(recipe)
    if not file.exists():
        return Lock()
    try:
        return Lock.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        hint = "delete it, and fetch again"
        raise Fault(f"is no lock file: {' '.join(str(error).split())}", file=file, hint=hint) from error


def write(recipe: Path, lock: Lock) -> None:
    """Write a recipe's lock."""
    files.write_json(lock_file(recipe), lock.model_dump())


def damage(reference: Reference, entry: Entry, to: str | None, hash_file: Callable[[Path], str]) -> str:
    """How the files of a reference differ from its lock, by name; empty where they don't."""
    folder = reference.folder(entry.commit, to)
    missing = [name for name in entry.files if not (folder / name).is_file()]
    changed = [
        name
        for name, told in entry.files.items()
        if name not in missing
        and ((folder / name).stat().st_size != told.bytes or hash_file(folder / name) != told.sha256)
    ]
    further = [name for name in _there(reference, folder) if name not in entry.files] if entry.reads is None else []
    told = ((missing, "missing"), (changed, "changed"), (further, "not of that revision"))
    return "; ".join(f"{_some(names)} {'is' if len(names) == 1 else 'are'} {what}" for names, what in told if names)


def _there(reference: Reference, folder: Path) -> list[str]:
    """The files of a reference that lie in a folder."""
    whole = folder / reference.place
    below = list(files.walk(whole)) if whole.is_dir() else [whole] if whole.is_file() else []
    return reference.takes(path.relative_to(folder).as_posix() for path in below)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def locate(given: Mapping[str, Input], recipe: Path, hash_file: Callable[[Path], str]) -> dict[str, Located]:
    """Where the references in a recipe lie; `given` has its inputs by their keys.

    Raises:
        UserError: one is no reference; or some are not fetched, or not as they were: names all of them.
    """
    lock = read(recipe)
    found: dict[str, Located] = {}
    absent: dict[str, str] = {}
    for key, value in given.items():
        text = str(value)
        if not is_reference(text) or text in found or text in absent:
            continue
        reference = parse(text, recipe, key)
        entry = lock.references.get(text)
        problem = damage(reference, entry, lock.folder, hash_file) if entry else ""
        is_whole = entry or reference.kind == "model" or isinstance(value, DataSet)  # a cache may hold half a data set
        located = _located(reference, entry, lock.folder) if is_whole else None
        if located and not problem:
            found[text] = located
        else:
            absent[text] = f"{text} ({key}{problem and f': {problem}'})"
    if absent:
        hint = f"`cordee fetch {recipe}` fetches what is missing, where there is a network"
        raise UserError(f"not fetched: {', '.join(absent.values())}", file=recipe, hint=hint)
    return found


def _located(reference: Reference, entry: Entry | None, to: str | None) -> Located | None:
    """Where a reference lies by its lock or, without one, in the cache of huggingface_hub; None where it does not."""
    commit = entry.commit if entry else reference.cached_commit()
    if commit is None:
        return None
    folder = reference.folder(commit, to if entry else None)
    path = (folder / reference.place).absolute()
    if path.is_file():
        return Located(path, reference.at(commit), None)
    names = list(entry.files) if entry else _there(reference, folder)
    start = f"{reference.place}/" if reference.place else ""
    inside = tuple(name.removeprefix(start) for name in names)
    return Located(path, reference.at(commit), inside) if inside else None
