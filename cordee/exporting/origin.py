"""What the manifests say of where a model comes from: its base, its data, and the stages that made it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cordee import artifact, files, hub, lineage, manifest, model_folder
from cordee.artifact import Artifact, Store
from cordee.data import hub as data_hub
from cordee.errors import UserError

APART = ("prompts", "heldout", "chat_template")
"""Keys of a stage whose files it does not train on."""
_MODEL_KEYS = ("model", "base", "adapter")
_SETTINGS_FILES = (".yaml", ".yml")
_HUB_FOLDER = re.compile(r"(?:models|datasets)--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]+/?$")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?=-|$)")


@dataclass(frozen=True)
class Source:
    """A file or a folder that a stage read and no stage made."""

    name: str
    """Its own name, without the folders that it lay in; of one of the hub, with its commit."""
    sha256: str
    stage: str
    """That read it."""
    hub: str | None
    """What it is called on the hub, if that is known."""
    licence: str | None
    """As the header of its README.md says."""


@dataclass
class Origin:
    """Where a model comes from; empty for a folder that lies in no artifact."""

    store: Store
    """That the artifact lies in."""
    made_by: Artifact | None = None
    stages: list[Artifact] = field(default_factory=list)
    """Those that made models, from the first to the last."""
    bases: list[Source] = field(default_factory=list)
    """Models that no stage made."""
    data: list[Source] = field(default_factory=list)
    corpora: list[Artifact] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """What can't be read any more, a line each."""

    @property
    def languages(self) -> list[str]:
        """The languages of the corpora, as ISO 639 codes."""
        tags = (tag for corpus in self.corpora for tag in _corpus(corpus).get("languages", {}))
        return sorted({found[0] for tag in tags if (found := _LANGUAGE.match(tag))})

    @property
    def licences(self) -> list[str]:
        """The licences of the corpora, a line each."""
        return [f"{corpus.name}: {line}" for corpus in self.corpora for line in lineage.licences(corpus)]


def find(folder: Path, store: Store) -> Origin:
    """What is known of the model or the adapter in a folder.

    Raises:
        Fault: the artifact that it lies in is damaged.
    """
    try:
        made_by = lineage.find(str(folder.resolve()), store)
    except UserError:  # it lies in none
        return Origin(store)
    if isinstance(made_by, artifact.Damaged):
        raise made_by.fault()
    found = Origin(Store(made_by.path.parent.parent), made_by)
    above: list[Artifact] = []
    for step in lineage.walk(made_by, found.store, apart=APART):
        above = above[: step.depth]
        if step.artifact is None and step.problem:
            found.unknown.append(f"{step.name} {step.problem}")
        elif step.artifact is None:
            _add_source(found, step, above[-1].manifest.stage)
        else:
            above.append(step.artifact)
            known = found.corpora if step.artifact.holds(lineage.CORPUS) else found.stages
            if step.artifact not in known and (known is found.corpora or _is_model(step.artifact)):
                known.append(step.artifact)
    found.stages.reverse()
    return found


def _add_source(found: Origin, step: lineage.Step, stage: str) -> None:
    path, is_model = Path(step.name), step.key.partition(".")[0] in _MODEL_KEYS
    if path.suffix in _SETTINGS_FILES and is_model:
        return  # the shape of a model that is trained from the start
    name, folder = _on_hub(step.name)
    licence = data_hub.header(folder).get("license") if folder.is_dir() else None
    told = licence if isinstance(licence, str) else None
    source = Source(_shown(step.name), step.sha256, stage, name, told)
    known = found.bases if is_model else found.data
    if source not in known:
        known.append(source)


def _on_hub(path: str) -> tuple[str | None, Path]:
    """What the hub calls a reference to it, or a folder in its cache, if that is known; and where it lies here."""
    if hub.is_reference(path):
        reference = hub.parse(path, None, "")
        return reference.name, reference.folder(reference.revision, None)
    cached = _HUB_FOLDER.search(path)
    return f"{cached[1]}/{cached[2]}" if cached else None, Path(path)


def _shown(path: str) -> str:
    """A path without the folders that it lies in on this machine."""
    return path.removeprefix(hub.PREFIX) if hub.is_reference(path) else Path(path).name


def _is_model(made: Artifact) -> bool:
    return made.holds("config.json") or made.holds(model_folder.ADAPTER_CONFIG)


def _corpus(made: Artifact) -> dict[str, Any]:
    content = {} if next(artifact.verify(made, lineage.CORPUS), None) else files.read_json(made.path / lineage.CORPUS)
    return content if isinstance(content, dict) else {}


def settings(made: Artifact) -> str:
    """The settings of a stage as YAML, without empty ones; what it read is named by its artifact or its own name."""
    names = made.manifest.names(_shown)

    def told_of(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: told_of(item) for key, item in value.items() if item not in (None, [], {})}
        if isinstance(value, list):
            return [told_of(item) for item in value]
        return value if (name := manifest.named(value, names)) is None else name

    told = told_of(made.manifest.identity.get("config", {}))
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=100) if told else ""


def read_rows(made: Artifact) -> Iterator[dict[str, Any]]:
    """What a stage that trains on chats or pairs has read of each source, by `rows.json`."""
    if made.holds("rows.json") and not next(artifact.verify(made, "rows.json"), None):
        for source in files.read_json(made.path / "rows.json")["sources"]:
            left_out = sum(kind["rows"] for kind in source.get("left_out", ()))
            yield {
                "loss_tokens": None,
                **source,
                "name": Path(source["path"]).name,
                "num_left_out": left_out,
                "stage": made.manifest.stage,
            }
