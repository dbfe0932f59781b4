"""lm-eval's tasks with the data that a recipe names, in batches that are asked in the same way.

Each task and group is written as a file that includes its own and names the data's paths: what is measured, what the
artifact keeps, and what lm-eval's own command reads are the same files.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import yaml
from lm_eval.tasks import TaskManager

from cordee import files
from cordee.errors import CordeeError, UserError, nearest
from eval.measuring import code_eval, questions, task_files
from eval.measuring.asked import Asked, How, TasksConfig
from eval.measuring.prompts import spread
from eval.measuring.task_files import TaskFile

TASKS = "tasks"
"""The folder of an artifact that holds the tasks as they were measured, for lm-eval's own command."""
EXAMPLES = ("training_split", "validation_split", "fewshot_split")
"""The keys of a task that name the splits which examples are drawn from."""


@dataclass
class Batch:
    """Tasks and groups that are asked in the same way: one call of lm-eval for each model."""

    label: str
    """Names the way in which they are asked: `plain`, `chat`, `chat-5-shot`, …"""
    how: Mapping[str, Any]
    """The arguments of lm-eval's call."""
    asked: dict[str, Asked] = field(default_factory=dict)
    """By the name of each task or group that was asked for."""
    loaded: Mapping[str, Any] = field(default_factory=dict)
    """lm-eval's tasks and groups, those in groups among them."""
    samples: dict[str, list[int]] | None = None
    """Numbers of the documents of each task that are asked; None: all."""

    @property
    def is_chat(self) -> bool:
        """Whether questions are asked in the chat template."""
        return bool(self.how["apply_chat_template"])

    @property
    def top(self) -> list[Any]:
        """lm-eval's tasks and groups that were asked for."""
        return [self.loaded["groups"].get(name) or self.loaded["tasks"][name] for name in self.asked]

    @property
    def samples_file(self) -> str:
        """Where the numbers of the documents are kept, for lm-eval's command."""
        return f"{TASKS}/samples-{self.label}.json"


def make(config: TasksConfig, out: Path, cache: Path, *, confirm_unsafe_code: bool = False) -> list[Batch]:
    """Write the tasks' files and load their data.

    Args:
        config: the tasks, and where their data are.
        out: gets `tasks/<task>.yaml`.
        cache: for the data in Arrow's form.
        confirm_unsafe_code: whether tasks may run code that models write.

    Raises:
        UserError: a task can't be asked as it is told, or its data are not there.
        Fault: a task runs code that models write, and there is no sandbox for it.
    """
    (out / TASKS).mkdir(exist_ok=True)
    batches: dict[str, Batch] = {}
    places: dict[str, Path] = {}
    for asked in config.tasks:
        found = task_files.contents(asked.task)
        for name, (file, told) in found.tasks.items():
            _require_one_place(name, file, places)
            _write(out, name, file, _data(told, file, config))
        for name, file in found.groups.items():
            _require_one_place(name, file, places)
            _write(out, name, file, {})
        own = [told for _, told in found.tasks.values()]
        if not own:
            raise UserError("is a group without tasks", file=asked.task, key="tasks")
        _add(batches, next(iter(found.groups or found.tasks)), asked, own)
    common = {name: getattr(config, name) for name in How.model_fields}
    for name, path in config.questions.items():
        _require_one_place(name, path, places)
        questions.write(name, path, out / TASKS, is_chat=bool(config.apply_chat_template))
        _add(batches, name, Asked(task=TaskFile(out / TASKS / f"{name}.yaml"), **common), [{}])
    with code_eval.offered(confirmed=confirm_unsafe_code):
        for batch in batches.values():
            _load(batch, out, cache / batch.label)
    return list(batches.values())


def _add(batches: dict[str, Batch], name: str, asked: Asked, tasks: Iterable[Mapping[str, Any]]) -> None:
    """Add a task or a group to the batch of those that are asked as it is."""
    how = _how(asked, tasks)
    label = _label(how, [batch.label for batch in batches.values()])
    batch = batches.setdefault(json.dumps(how, sort_keys=True), Batch(label, how))
    if name in batch.asked:
        raise UserError(f"{name} is asked twice in the same way", file=asked.task, key="tasks")
    batch.asked[name] = asked


def _require_one_place(name: str, file: Path, places: dict[str, Path]) -> None:
    """Check that a name, by which lm-eval tells tasks apart, has one file."""
    earlier = places.setdefault(name, file.resolve())
    if earlier != file.resolve():
        problem = f"its name {name!r} is that of {earlier} too: only one of them would be measured"
        raise UserError(problem, file=file, key="tasks", hint="give one of them another `task:`")


def _write(out: Path, name: str, file: Path, data: Mapping[str, Any]) -> None:
    text = yaml.safe_dump({"include": str(file.resolve()), **data}, allow_unicode=True)
    files.write_text(out / TASKS / f"{name}.yaml", text)


def _data(told: Mapping[str, Any], file: Path, config: TasksConfig) -> dict[str, Any]:
    """The keys of a task that name its data, with the paths of the data in the place of their names."""
    path = told.get("dataset_path")
    if path not in task_files.BUILDERS:
        return _of_hub(told, config.datasets[path].resolve()) if path in config.datasets else {}
    kwargs = dict(told.get("dataset_kwargs") or {})
    if not isinstance(kwargs.get("data_files"), dict):
        problem = "reads files, and `dataset_kwargs: {data_files: {…}}` does not say by split which"
        raise UserError(problem, file=file, key="dataset_kwargs")
    found = {}
    for split, name in kwargs["data_files"].items():
        beside = file.parent / str(name)
        if str(name) not in config.data and not beside.is_file():
            raise UserError(f"needs data named {name!r}", file=file, key="data", hint=nearest(str(name), config.data))
        found[split] = str(config.data.get(str(name), beside).resolve())
    return {"dataset_kwargs": {**kwargs, "data_files": found}}


def _of_hub(told: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The keys of a task that reads a data set of the hub; splits for examples that it does not have are left out.

    lm-eval reads these splits even where no examples are asked for.
    """
    try:
        splits = datasets.get_dataset_split_names(str(folder), told.get("dataset_name"))
    except Exception:  # noqa: BLE001 - of datasets; loading it will say what is wrong
        return {"dataset_path": str(folder)}
    absent = [key for key in EXAMPLES if isinstance(told.get(key), str) and told[key] not in splits]
    return {"dataset_path": str(folder), **dict.fromkeys(absent)}


def _how(asked: Asked, tasks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of lm-eval's call for a task or a group.

    Raises:
        UserError: its tasks don't agree on whether they are asked in chats, and no key says it.
    """
    is_chat = asked.apply_chat_template
    if is_chat is None:
        wanted = {bool((told.get("metadata") or {}).get("chat")) for told in tasks}
        if len(wanted) > 1:
            raise UserError("some of its tasks are chats, others not", file=asked.task, key="apply_chat_template")
        is_chat = wanted.pop()
    multiturn = is_chat if asked.fewshot_as_multiturn is None else asked.fewshot_as_multiturn
    if multiturn and not is_chat:
        raise UserError("is for chats", key="fewshot_as_multiturn", hint="apply_chat_template: true")
    return {
        "num_fewshot": asked.num_fewshot,
        "apply_chat_template": is_chat,
        "fewshot_as_multiturn": multiturn,
        "system_instruction": asked.system_instruction,
        "gen_kwargs": asked.gen_kwargs or None,
    }


def _label(how: Mapping[str, Any], taken: list[str]) -> str:
    """A short name for a way of asking."""
    words = ["chat"] if how["apply_chat_template"] else []
    words += ["" if how["num_fewshot"] is None else f"{how['num_fewshot']}-shot"]
    words += ["system"] if how["system_instruction"] else []
    words += ["sampled"] if how["gen_kwargs"] else []
    label = "-".join(filter(None, words)) or "plain"
    return next(name for name in (label, *(f"{label}-{n}" for n in range(2, len(taken) + 3))) if name not in taken)


def _load(batch: Batch, out: Path, cache: Path) -> None:
    """Load a batch's tasks with their data, and choose their documents.

    Each has a cache of its own: `datasets` takes folders of one name with equal readme files for one data set.

    Raises:
        UserError: lm-eval can't.
    """
    manager = TaskManager(include_path=str(out / TASKS), include_defaults=False)
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    for name, asked in batch.asked.items():
        datasets.config.HF_DATASETS_CACHE = str(cache / name)
        try:
            own = manager.load([name])
        except CordeeError:
            raise
        except ImportError as error:
            hint = "install what is missing"
            raise UserError(f"lm-eval can't load it: {error}", file=asked.task, key="tasks", hint=hint) from error
        except Exception as error:  # of lm-eval, of datasets, or of a task's own code
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"lm-eval can't load it: {problem}", file=asked.task, key="tasks") from error
        if again := own["tasks"].keys() & loaded["tasks"].keys():
            problem = f"{sorted(again)[0]} is asked twice in the same way, once as {name}"
            raise UserError(problem, file=asked.task, key="tasks")
        for kind in loaded:
            loaded[kind] |= own.get(kind, {})
    batch.loaded = loaded
    for name, task in batch.loaded["tasks"].items():
        _require_sandbox(name, task)
        _require_examples(name, task, batch.how["num_fewshot"])
        if name in batch.asked:
            _require_metric(name, batch.asked[name], task)
    _choose(batch, out)


def _choose(batch: Batch, out: Path) -> None:
    """Choose the documents of each task, and write their numbers, where there is a limit."""
    if all(asked.limit is None for asked in batch.asked.values()):
        return
    batch.samples = {}
    for name, asked in batch.asked.items():
        inside = batch.loaded["groups"].get(name)
        for task in inside.get_all_tasks() if inside else [batch.loaded["tasks"][name]]:
            batch.samples[task.task_name] = _chosen(task.eval_docs, asked.limit)
    files.write_json(out / batch.samples_file, batch.samples)


def _require_sandbox(name: str, task: Any) -> None:
    """Check that a task which says that it runs code of models does so in the sandbox."""
    if getattr(task, "UNSAFE_CODE", False) and not code_eval.is_used_by(task):
        problem = f"{name} runs code that the models write by functions of its own, outside of the sandbox"
        hint = f"what is measured by the metric {code_eval.NAME!r}, as humaneval and mbpp, can be run"
        raise UserError(problem, key="tasks", hint=hint)


def _require_metric(name: str, asked: Asked, task: Any) -> None:
    """Check that a task has the metric that is to be shown first, and its filter."""
    wanted, _, chosen = (asked.metric or "").partition(",")
    filters = [told["name"] for told in task.config.filter_list or [{"name": "none"}]]
    for word, known, what in ((wanted, task.aggregation(), "metric"), (chosen, filters, "filter")):
        if word and word not in known:
            raise UserError(f"{name} has no {what} {word!r}", key="tasks.metric", hint=nearest(word, known))


def _require_examples(name: str, task: Any, asked: int | None) -> None:
    """Check that examples are not drawn from the documents that are asked, each with its own answer among them."""
    own, examples = task.config.num_fewshot, getattr(task, "fewshot_cfg", None)
    shots = own if asked is None or own == 0 else asked
    has_source = task.has_training_docs() or task.has_validation_docs()
    if shots and not (has_source or (examples and (examples.split or examples.samples))):
        problem = f"{name}: examples would be drawn from the documents that are asked, each with its own answer among"
        split = getattr(task.config, "test_split", "test")
        hint = f"`fewshot_split: {split}` in the task's file leaves the asked one out; or `num_fewshot: 0`"
        raise UserError(f"{problem} them", key="num_fewshot", hint=hint)


def _chosen(documents: Any, limit: int | None) -> list[int]:
    """The numbers of the documents that are asked."""
    if limit is None:
        return list(range(len(documents)))
    if "language" not in getattr(documents, "column_names", ()):
        return list(range(min(limit, len(documents))))
    return spread([language or "" for language in documents["language"]], limit)
