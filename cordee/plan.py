"""A plan: a recipe compared with the published artifacts, and its cost before anything starts.

A stage is *done* when an artifact with its fingerprint exists, *stale* when this recipe has published it under another
identity (the plan says which keys differ), and *ready* otherwise. What is not done will run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cordee import artifact, hub, identity
from cordee.artifact import REFERENCE, Artifact, Damaged, Store
from cordee.config import Config, Input, inputs, resolved
from cordee.cost import Cost
from cordee.errors import CordeeError, UserError, nearest
from cordee.hashes import Kept
from cordee.recipe import CERTIFICATES, Recipe, RecipeStage

REPORT = "eval.report"


@dataclass(frozen=True)
class Target:
    """What an `Input` points to."""

    identity: str
    """Its part of the identity: `artifact <fingerprint>/<place>` or `content <sha256>/<kind of data file>`."""
    stage: str | None = None
    """The stage of this recipe that publishes it; None for anything else."""
    artifact: Artifact | None = None
    path: Path | None = None
    """The file or folder; None as long as its stage is not done."""
    place: str = ""
    """Within the artifact."""
    source: str = ""
    """Of what was fetched from the hub, its reference with the commit."""
    files: tuple[str, ...] | None = None
    """Of a folder that was fetched, the files that count, relative to it; None: all."""


@dataclass(frozen=True)
class Planned:
    """One stage of a plan."""

    item: RecipeStage
    config: Config
    inputs: dict[str, Target]
    """By the key of the config: `model`, `data.0.path`."""
    identity: dict[str, Any]
    fingerprint: str
    state: str
    """`done`, `stale` or `ready`."""
    why: tuple[str, ...]
    """What changed, key by key; whether an interrupted attempt will be continued; which artifacts are damaged."""
    artifact: Artifact | None
    cost: Cost
    estimate: Callable[[dict[str, Any]], Cost] | None = field(default=None, compare=False, repr=False)
    """The cost with some keys changed; None where the stage's module can't say."""

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
    artifacts: tuple[Artifact, ...]
    """All in the store that can be used."""
    damaged: tuple[Damaged, ...]
    """All others: they count as not made."""

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

    def awaited(self, planned: Planned) -> list[str]:
        """The stages that a stage reads and that are not done."""
        return [name for name in planned.item.needs if self.stage(name).artifact is None]

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
    """Compare a recipe with a store: what is done, what is stale and why, what it costs.

    Raises:
        UserError: an input is missing, or is not fetched.
        Fault: an input is a damaged artifact that no stage of this recipe can make anew.
    """
    kept = Kept(store.hashes)
    found = store.scan(recipe.name)
    artifacts = tuple(one for one in found if isinstance(one, Artifact))
    damaged = tuple(one for one in found if isinstance(one, Damaged))
    given = {f"stages.{item.name}.{key}": value for item in recipe.stages for key, value in inputs(item.config)}
    fetched = hub.locate(given, recipe.file, kept.of)
    planned: dict[str, Planned] = {}
    for item in recipe.stages:
        current = {stage.fingerprint for stage in planned.values()}
        proofs = [one for one in artifacts if one.manifest.proves in current]
        newest = {(one.manifest.recipe, one.manifest.stage): one for one in proofs}
        config = _with_certificates(item.config, list(newest.values()))
        targets = {
            key: _of_hub(value, fetched[str(value)], kept)
            if hub.is_reference(value)
            else _target(value, planned, store, kept, (recipe.file, f"stages.{item.name}.{key}"))
            for key, value in inputs(config)
        }
        planned[item.name] = _planned(recipe, item, (config, targets), store, found, planned)
    kept.save()
    return Plan(recipe, store, tuple(planned.values()), artifacts, damaged)


def _planned(
    recipe: Recipe,
    item: RecipeStage,
    read: tuple[Config, dict[str, Target]],
    store: Store,
    found: list[Artifact | Damaged],
    before: dict[str, Planned],
) -> Planned:
    """One stage's state and cost."""
    config, targets = read
    pointed = {key: target.identity for key, target in targets.items()}
    place = (recipe.file, f"stages.{item.name}")
    now = identity.of_stage(item.stage.uses, recipe.seed, config, pointed, place, item.stage.version)
    fingerprint = identity.fingerprint(now)
    artifacts = [one for one in found if isinstance(one, Artifact)]
    done = next((one for one in artifacts if one.fingerprint == fingerprint), None)
    earlier = [one for one in artifacts if (one.manifest.recipe, one.manifest.stage) == (recipe.name, item.name)]
    if done:
        return Planned(item, config, targets, now, fingerprint, "done", (), done, measured(done))
    why = _reasons(earlier[-1], now, targets) if earlier else []
    why += [
        f"{one.name} counts as not made: {one.problem}"
        for one in found
        if isinstance(one, Damaged) and one.is_of(recipe.name, item.name)
    ]
    if store.work_folders(recipe.name, item.name, fingerprint).fingerprint == fingerprint:
        why.append("continues where it was stopped")
    estimate = _estimate(item, config, targets, before) if item.stage.cost else None
    cost, damage = _cost(recipe, item, targets, estimate) if estimate else (Cost(), [])
    state = "stale" if earlier else "ready"
    return Planned(item, config, targets, now, fingerprint, state, (*why, *damage), None, cost, estimate)


def _reasons(earlier: Artifact, now: dict[str, Any], targets: dict[str, Target]) -> list[str]:
    """What changed since the newest version; for an input that this recipe publishes, the name of its stage."""
    lines = []
    for line in identity.differences(earlier.manifest.identity, now):
        key = line.partition(" ")[0]
        target = targets.get(key)
        lines.append(f"{key}: follows {target.stage}" if target and target.stage else line)
    return lines


def _estimate(
    item: RecipeStage, config: Config, targets: dict[str, Target], before: dict[str, Planned]
) -> Callable[[dict[str, Any]], Cost]:
    """A function that says what a stage would cost with some of its keys changed."""
    given = {}
    for key, target in targets.items():
        if target.stage:
            given[key] = before[target.stage].cost
        elif target.artifact:
            given[key] = measured(target.artifact)

    def estimate(changes: dict[str, Any]) -> Cost:
        # An input that exists is given as its path, so that its files can be read; any other stays a reference.
        paths = {key: str(targets[key].path or value) for key, value in inputs(config)}
        told = type(config).model_validate({**resolved(config, paths), **changes})
        return item.stage.cost(told, given) if item.stage.cost else Cost()

    return estimate


def _cost(
    recipe: Recipe, item: RecipeStage, targets: dict[str, Target], estimate: Callable[[dict[str, Any]], Cost]
) -> tuple[Cost, list[str]]:
    """What a stage will cost, as far as its module can say; unknown where an artifact that it reads is damaged.

    Raises:
        CordeeError: one of its inputs can't be used.
    """
    try:
        return estimate({}), []
    except Exception as error:
        read = [(key, target.artifact, target.place) for key, target in targets.items() if target.artifact]
        damage = [f"{key}: {line}" for key, of, place in read for line in artifact.verify(of, place)]
        if damage:
            return Cost(), damage
        if isinstance(error, CordeeError):
            raise in_recipe(recipe, item, error) from error
        raise


def in_recipe(recipe: Recipe, item: RecipeStage, error: CordeeError) -> CordeeError:
    """A stage's error as one of its recipe: `r.yaml: stages.sft.data: …`."""
    return error.in_stage(recipe.file, f"stages.{item.name}", type(item.config).model_fields)


def measured(of: Artifact) -> Cost:
    """The cost of an artifact, as it was measured."""
    told = of.manifest
    names = ("tokens", "flops", "parameters", "vocab_size", "rows")
    known: dict[str, Any] = {name: told.metrics[name] for name in names if _is_number(told.metrics.get(name))}
    return Cost(memory_bytes=told.peak_memory_bytes, seconds=told.seconds, **known)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _with_certificates(config: Config, certificates: list[Artifact]) -> Config:
    """Put the recipe's certificates where a list of inputs holds `$certificates`."""
    changed = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, list) and Input(CERTIFICATES) in value:
            others = [item for item in value if item != Input(CERTIFICATES)]
            changed[name] = [*others, *(Input(artifact.name) for artifact in certificates)]
    return config.model_copy(update=changed) if changed else config


def _of_hub(value: Input, found: hub.Located, kept: Kept) -> Target:
    """What a reference to the hub points to: it counts by its content, as any other file or folder."""
    path = type(value)(found.path)
    content = identity.of_path(path, kept.of(path, found.files))
    return Target(content, path=path, source=found.source, files=found.files)


def _target(value: Input, planned: dict[str, Planned], store: Store, kept: Kept, place: tuple[object, str]) -> Target:
    """Find what an input points to."""
    text, (file, key) = str(value), place
    match = REFERENCE.fullmatch(text)
    if (text.startswith("$") or match) and ".." in value.parts:
        hint = "name another artifact as $stage or recipe/stage@version"
        raise UserError(f"{text!r} leads out of the artifact", file=file, key=key, hint=hint)
    if text.startswith("$"):
        name, _, inside = text[1:].partition("/")
        if name not in planned:
            raise UserError(f"{text} is no single artifact", file=file, key=key, hint="use it in a list of inputs")
        stage = planned[name]
        path = stage.artifact.at(inside, file=file, key=key) if stage.artifact else None
        return Target(f"artifact {stage.fingerprint}/{inside}".rstrip("/"), name, stage.artifact, path, inside)
    if match:
        return _in_artifact(store.find(text), match["place"] or "", file=file, key=key)
    path = Path(text)
    if not path.exists():
        if path.is_symlink():
            raise UserError(f"{text!r} is a link to {path.readlink()}, which is not there", file=file, key=key)
        raise UserError(f"no file or folder {text!r}", file=file, key=key, hint=_how_to_get(path, file))
    if found := store.around(path):
        return _in_artifact(*found, file=file, key=key)
    return Target(identity.of_path(value, kept.of(value)), path=value.absolute())


def _how_to_get(path: Path, recipe: object) -> str:
    """What helps where a path is not there: a target of the current folder's Makefile, a name that is near, the hub."""
    makefile = Path("Makefile")
    if makefile.is_file() and f"\n{path}:" in makefile.read_text(encoding="utf-8", errors="replace"):
        return f"`make {path}` makes it"
    beside = [str(path.parent / name.name) for name in path.parent.iterdir()] if path.parent.is_dir() else []
    if beside:
        return nearest(str(path), beside)
    on_hub = f"; if it is on the hub, write {hub.PREFIX}{path} and run `cordee fetch {recipe}`"
    return f"looked in {Path.cwd()}{on_hub if hub.may_be_name(path) else ''}"


def _in_artifact(found: Artifact | Damaged, inside: str, *, file: object, key: str) -> Target:
    """A place in an artifact that was named directly, not as a stage of this recipe."""
    if isinstance(found, Damaged):
        raise found.fault(file=file, key=key)
    path = found.at(inside, file=file, key=key)
    return Target(f"artifact {found.fingerprint}/{inside}".rstrip("/"), None, found, path, inside)
