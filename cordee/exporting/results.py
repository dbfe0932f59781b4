"""The figures of all benchmarks in a store that measured these weights, as their `results.json` has them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee import artifact, files, hashes, manifest
from cordee.artifact import Artifact, Store
from cordee.errors import UserError
from cordee.model_folder import ModelInput

RESULTS = "results.json"


@dataclass(frozen=True)
class Result:
    """One figure of a task, and how it was measured."""

    artifact: str
    task: str
    description: str
    asked: str
    """`plain`, `chat`, `chat-5-shot`, …"""
    how: Mapping[str, Any]
    """The arguments of lm-eval's call that were given."""
    shots: int | None
    version: Any
    metric: str
    filter: str
    is_main: bool
    """Whether it is what is shown first of the task."""
    value: float
    standard_error: float | None
    documents: int | None
    documents_in_all: int | None
    """Of the task; more than were measured where there was a limit."""
    chance: float | None
    higher_is_better: bool
    engine: str
    """Name, version and dtype of what computed."""
    dataset: dict[str, str]
    """`type`, `config` and `split` as the hub names them, as far as lm-eval's own results say."""


def find(folder: Path, sha256s: frozenset[str], store: Store) -> tuple[list[Result], list[str]]:
    """The figures of the model in a folder, whose weights' files have these hashes.

    Returns:
        The figures, a later measurement in the place of an equal earlier one; and a line for each benchmark that can't
        be read.
    """
    found: dict[tuple[Any, ...], Result] = {}
    unread: list[str] = []
    made = [one for one in store.scan() if isinstance(one, Artifact) and one.holds(RESULTS)]
    for one in sorted(made, key=lambda one: one.manifest.started):
        names = [read.key.partition(".")[2] for read in one.manifest.inputs if _is_of(read, folder, sha256s, store)]
        if not names:
            continue
        if any(artifact.verify(one, RESULTS)):
            unread.append(f"{one.name}, whose {RESULTS} is not what was published")
            continue
        table: dict[str, Any] = files.read_json(one.path / RESULTS)
        for row in (row for row in table["models"] if row["name"] in names):
            for result in _results(one, table["engine"], row):
                how = json.dumps(result.how, sort_keys=True)
                key = (result.task, how, result.metric, result.filter, result.engine, result.documents)
                found[key] = result
    return list(found.values()), unread


def _is_of(read: manifest.Read, folder: Path, sha256s: frozenset[str], store: Store) -> bool:
    """Whether a benchmark read these weights as one of its `models`."""
    if not read.key.startswith("models."):
        return False
    if not read.artifact:
        return manifest.around(folder) is None and read.sha256 == hashes.of_content(ModelInput(folder))
    try:
        measured = store.find(read.artifact)
    except UserError:  # it is not there any more
        return False
    if not isinstance(measured, Artifact) or measured.fingerprint != read.fingerprint:
        return False
    own = {item.sha256 for item in measured.manifest.files if _is_weights(item.path, read.path)}
    return bool(own) and own == sha256s


def _is_weights(path: str, place: str) -> bool:
    return path.endswith(".safetensors") and path.rpartition("/")[0] == place


def _results(made: Artifact, engine: dict[str, Any], row: dict[str, Any]) -> Iterator[Result]:
    """The figures of the tasks and groups that were asked for, the main one of each first."""
    computed = f"{engine['name']} {engine.get('version', '')}, {row.get('dtype') or engine.get('dtype', '')}"
    for task in row["tasks"]:
        if not task.get("is_asked", True):
            continue
        own = [one for one in row["results"] if (one["task"], one["asked"]) == (task["task"], task["asked"])]
        dataset = _dataset(made, row["name"], task)
        for one in sorted(own, key=lambda one: (one["metric"], one["filter"]) != (task["metric"], task["filter"])):
            yield Result(
                artifact=made.name, task=task["task"], description=task.get("description") or "", asked=task["asked"],
                how=task.get("how") or {},
                shots=task.get("shots"), version=task.get("version"), metric=one["metric"], filter=one["filter"],
                is_main=(one["metric"], one["filter"]) == (task["metric"], task["filter"]), value=one["value"],
                standard_error=one.get("standard_error"), documents=one.get("documents"),
                documents_in_all=task.get("documents_in_all"), chance=task.get("chance"),
                higher_is_better=task["higher_is_better"].get(one["metric"], True), engine=computed, dataset=dataset,
            )  # fmt: skip


def _dataset(made: Artifact, model: str, task: dict[str, Any]) -> dict[str, str]:
    """What the hub calls the data of a task, by lm-eval's own results; empty if they are no data set of the hub."""
    folder = f"lm_eval/{model}/{task['asked']}"
    file = next(
        (made.path / item.path for item in made.manifest.files if item.path.startswith(f"{folder}/results_")), None
    )
    own = files.read_json(file)["configs"].get(task["task"], {}) if file else {}
    path = str(own.get("dataset_path") or "")
    given = made.manifest.identity.get("config", {}).get("datasets") or {}
    names = [name for name in given if path == name or path.endswith(f"/{name}")]
    name = names[0] if names else path if "/" in path and not path.startswith(("/", ".")) else ""
    fields = {"type": name, "config": own.get("dataset_name"), "split": own.get("test_split")}
    return {key: str(value) for key, value in fields.items() if value} if name else {}
