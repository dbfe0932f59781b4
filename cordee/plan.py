"""A plan: a recipe resolved against what was made before, with its cost before anything starts.

A stage is *done* when an artifact with its fingerprint exists, *stale* when this recipe made it under another
identity (the plan says which keys differ), and *ready* when it was never made. What is not done will run.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee import files, identity
from cordee.artifact import REFERENCE, Artifact, Store, around
from cordee.config import Config, Input, inputs, resolved
from cordee.cost import Cost
from cordee.errors import CordeeError, UserError, nearest
from cordee.recipe import CERTIFICATES, Recipe, RecipeStage

REPORT = "eval.report"


@dataclass(frozen=True)
class Source:
    """What an `Input` points to."""

    identity: str
    """How it stands in the identity: `artifact <fingerprint>/<place>` or `content <sha256>`."""
    stage: str | None = None
    """The stage of this recipe that makes it."""
    artifact: Artifact | None = None
    path: Path | None = None
    """Where it lies; None as long as it is not made."""
    place: str = ""


@dataclass(frozen=True)
class Planned:
    """One stage of a plan."""

    item: RecipeStage
    config: Config
    sources: dict[str, Source]
    identity: dict[str, Any]
    fingerprint: str
    state: str
    """`done`, `stale` or `ready`."""
    why: tuple[str, ...]
    """For a stale stage, key by key what changed; for a ready one, what an interrupted run left."""
    artifact: Artifact | None
    cost: Cost

    @property
    def name(self) -> str:
        """The stage's name in the recipe."""
        return self.item.name


@dataclass(frozen=True)
class Plan:
    """A recipe's stages in the order in which they run."""

    recipe: Recipe
    store: Store
    stages: tuple[Planned, ...]

    def stage(self, name: str) -> Planned:
        """The stage of that name.

        Raises:
            UserError: there is none.
        """
        for planned in self.stages:
            if planned.name == name:
                return planned
        known = [planned.name for planned in self.stages]
        raise UserError(f"no stage {name!r}", file=self.recipe.file, hint=nearest(name, known))

    def reports(self) -> set[str]:
        """The names of the stages that make a report.

        Raises:
            UserError: there is none.
        """
        names = {planned.name for planned in self.stages if planned.item.stage.uses == REPORT}
        if not names:
            raise UserError(f"has no stage that uses {REPORT}", file=self.recipe.file, key="stages")
        return names


def make(recipe: Recipe, store: Store) -> Plan:
    """Resolve a recipe: what is done, what is stale and why, what it costs.

    Raises:
        UserError: an input is missing.
    """
    hashes = _Hashes(store.root / ".hashes.json")
    made = store.everything(recipe.name)
    planned: dict[str, Planned] = {}
    for item in recipe.stages:
        current = {stage.fingerprint for stage in planned.values()}
        certificates = [artifact for artifact in made if artifact.manifest["proves"] in current]
        config = _with_certificates(item.config, certificates)
        sources = {
            key: _source(value, planned, store, hashes, (recipe.file, f"stages.{item.name}.{key}"))
            for key, value in inputs(config)
        }
        planned[item.name] = _planned(recipe, item, (config, sources), store, made, planned)
    hashes.save()
    return Plan(recipe, store, tuple(planned.values()))


def _planned(
    recipe: Recipe,
    item: RecipeStage,
    read: tuple[Config, dict[str, Source]],
    store: Store,
    made: list[Artifact],
    before: dict[str, Planned],
) -> Planned:
    """One stage's state and cost."""
    config, sources = read
    pointed = {key: source.identity for key, source in sources.items()}
    place = (recipe.file, f"stages.{item.name}")
    stands_for = identity.of_stage(item.stage.uses, recipe.seed, config, pointed, place)
    fingerprint = identity.fingerprint(stands_for)
    artifact = next((one for one in made if one.fingerprint == fingerprint), None)
    earlier = [one for one in made if (one.manifest["recipe"], one.manifest["stage"]) == (recipe.name, item.name)]
    why: list[str] = []
    if artifact:
        state = "done"
    elif earlier:
        state, why = "stale", _reasons(earlier[-1], stands_for, sources)
    else:
        state = "ready"
    if not artifact and store.work_folders(recipe.name, item.name, fingerprint).out.exists():
        why.append("goes on where it was stopped")
    cost = measured(artifact) if artifact else _cost(recipe, item, config, sources, before)
    return Planned(item, config, sources, stands_for, fingerprint, state, tuple(why), artifact, cost)


def _reasons(earlier: Artifact, now: dict[str, Any], sources: dict[str, Source]) -> list[str]:
    """What changed since the newest version; an input that this recipe makes is named by its stage."""
    lines = []
    for line in identity.differences(earlier.manifest["identity"], now):
        key = line.partition(" ")[0]
        source = sources.get(key)
        lines.append(f"{key}: follows {source.stage}" if source and source.stage else line)
    return lines


def in_recipe(recipe: Recipe, item: RecipeStage, error: str) -> str:
    """What a stage said is wrong, with the recipe's file and its name before it: `r.yaml: stages.sft.data: …`."""
    key = re.match(r"(\w+)[\w.-]*: ", error)
    joint = "." if key and key[1] in type(item.config).model_fields else ": "
    return f"{recipe.file}: stages.{item.name}{joint}{error}"


def _cost(
    recipe: Recipe, item: RecipeStage, config: Config, sources: dict[str, Source], before: dict[str, Planned]
) -> Cost:
    """What a stage will cost, as far as its module can say.

    Raises:
        CordeeError: what it is given can't be used.
    """
    if item.stage.cost is None:
        return Cost()
    # What is made already is given as a path, so that its files can be read; what is not stays a reference.
    paths = {key: str(sources[key].path or value) for key, value in inputs(config)}
    config = type(config).model_validate(resolved(config, paths))
    given = {}
    for key, source in sources.items():
        if source.stage:
            given[key] = before[source.stage].cost
        elif source.artifact:
            given[key] = measured(source.artifact)
    try:
        return item.stage.cost(config, given)
    except CordeeError as error:
        raise type(error)(in_recipe(recipe, item, str(error))) from error


def measured(artifact: Artifact) -> Cost:
    """What an artifact's manifest says that it cost."""
    metrics = artifact.manifest["metrics"]
    known = {name: metrics.get(name) for name in ("tokens", "flops", "parameters", "vocab_size", "rows")}
    return Cost(memory_bytes=artifact.manifest["peak_memory_bytes"], seconds=artifact.manifest["seconds"], **known)


def _with_certificates(config: Config, certificates: list[Artifact]) -> Config:
    """Put the recipe's certificates where a list of inputs holds `$certificates`."""
    changed = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, list) and Input(CERTIFICATES) in value:
            others = [item for item in value if item != Input(CERTIFICATES)]
            changed[name] = [*others, *(Input(artifact.name) for artifact in certificates)]
    return config.model_copy(update=changed) if changed else config


def _source(
    value: Input, planned: dict[str, Planned], store: Store, hashes: "_Hashes", place: tuple[object, str]
) -> Source:
    """Find what an input points to."""
    text, (file, key) = str(value), place
    match = REFERENCE.fullmatch(text)
    if (text.startswith("$") or match) and ".." in value.parts:
        hint = "name another artifact as $stage or recipe/stage@version"
        raise UserError(f"{text!r} leads out of the artifact", file=file, key=key, hint=hint)
    if text.startswith("$"):
        name, _, inside = text[1:].partition("/")
        if name not in planned:
            raise UserError(
                f"{text} is no single artifact", file=file, key=key, hint="it can stand in a list of inputs"
            )
        stage = planned[name]
        path = stage.artifact.at(inside, file=file, key=key) if stage.artifact else None
        return Source(f"artifact {stage.fingerprint}/{inside}".rstrip("/"), name, stage.artifact, path, inside)
    if match:
        return _in_artifact(store.open(text), match["place"] or "", file=file, key=key)
    path = Path(text)
    if not path.exists():
        beside = [str(path.parent / name.name) for name in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(text, beside) if beside else f"looked in {Path.cwd()}"
        raise UserError(f"no file or folder {text!r}", file=file, key=key, hint=hint)
    found = around(path)
    if found and found[0].path.is_relative_to(store.root.resolve()):
        return _in_artifact(*found, file=file, key=key)
    return Source(f"content {hashes.of(path)}", path=path.absolute())


def _in_artifact(artifact: Artifact, inside: str, *, file: object, key: str) -> Source:
    """A place in an artifact that was named by itself, not as a stage of this recipe."""
    path = artifact.at(inside, file=file, key=key)
    return Source(f"artifact {artifact.fingerprint}/{inside}".rstrip("/"), None, artifact, path, inside)


def content(path: Path, of_file: Callable[[Path], str] = files.sha256) -> str:
    """The SHA-256 of a file, or of a folder's file names and their hashes."""
    if not path.is_dir():
        return of_file(path)
    listed = [[item.relative_to(path).as_posix(), of_file(item)] for item in files.walk(path)]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


class _Hashes:
    """Content hashes of files outside the store, kept by size and time so that `plan` answers at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.known: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            self.known = {}
        self.changed = False

    def of(self, path: Path) -> str:
        """The hash of a file's or folder's content."""
        return content(path, self._of_file)

    def _of_file(self, path: Path) -> str:
        state = path.stat()
        key, mark = str(path.resolve()), [state.st_size, state.st_mtime_ns, state.st_ino]
        if self.known.get(key, [None])[:-1] != mark:
            self.known[key] = [*mark, files.sha256(path)]
            self.changed = True
        return str(self.known[key][-1])

    def save(self) -> None:
        """Keep what was hashed; a store that can't be written yet is no reason to stop planning."""
        if self.changed and os.access(self.path.parent, os.W_OK):
            files.write_text(self.path, json.dumps(self.known))
