"""Which tasks a benchmark asks and how: lm-eval's names, its files or one's own, each with keys of its own."""

import fnmatch
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import Field, model_validator

from cordee import hub
from cordee.config import Config, Execution, Input
from cordee.errors import UserError, nearest
from cordee.hub import DataSet, Reads
from eval.measuring import catalog, task_files
from eval.measuring.task_files import TaskFile

CONFIRM = "`confirm_unsafe_code: true` if you accept that"
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""A name that can be a folder's or a file's."""
HF = "hf://"
"""Begins what tasks' files write for a file of the hub: the rest is as in a reference."""


class How(Config):
    """How tasks are asked, as lm-eval's command names it; what is not given is as the command has it by default."""

    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; a task whose own file says 0 keeps to it."""
    apply_chat_template: bool | None = None
    """Whether questions are asked in the model's chat template. Without it: as `chat` in the task file's `metadata`
    says, else not."""
    fewshot_as_multiturn: bool | None = None
    """Whether examples are turns of the chat; without it they are where there is a chat."""
    system_instruction: str | None = None
    """Text before the question, in a chat as its system turn."""
    gen_kwargs: dict[str, Any] = Field(default={})
    """How answers are generated, over what the tasks' files say (`temperature`, `max_gen_toks`, `until`, …)."""
    limit: int | None = Field(default=None, ge=1)
    """Documents per task, spread evenly over the languages where they have a column `language`, else the first; all of
    them if not given."""


class Asked(How):
    """A task or a group, and how it is asked."""

    task: TaskFile
    """lm-eval's name of a task, a group or a tag, or a task file. The file's content is part of the identity, with that
    of what it includes and of the modules whose functions it names."""
    metric: str | None = None
    """The metric that the report shows first, with its filter if there are several: `exact_match`, or
    `exact_match,strict-match`; without it, the first."""


class TasksConfig(How):
    """Base of the stage that asks tasks: the tasks, and how all of them are asked that don't say otherwise."""

    tasks: list[Asked] = Field(default=[])
    """Names of lm-eval's tasks, groups and tags (`gsm8k`, `xcopa`, `mmlu_*`) and task files; or mappings, `task:` and
    how it is asked."""
    questions: dict[Name, Input] = Field(default={})
    """Files of one's own with `question`, `answer` and, for multiple choice, `choices`: each by the name of its task,
    or one file, whose name it gets."""
    data: dict[str, Input] = Field(default={})
    """The files that tasks read, by the names that stand in their `data_files`."""
    data_dir: Execution[str | None] = None
    """A folder in which the hub's data sets lie by their names (`openai/gsm8k`), or that of `cordee fetch --to`."""
    datasets: dict[str, Input] = Field(default={})
    """The folder of each data set of the hub that a task reads, or a reference (`hub:datasets/openai/gsm8k@main`). What
    is not given is looked for in `data_dir`; what is not there either is what `cordee fetch` fetched, or what the cache
    of huggingface_hub has."""

    @model_validator(mode="before")
    @classmethod
    def _found(cls, given: Any) -> Any:
        """Files in the place of names, and folders of the data sets that they read."""
        if not isinstance(given, dict):
            return given
        if isinstance(file := given.get("questions"), str):
            name = re.sub(r"\W+", "_", Path(file).name.partition(".")[0])
            given = {**given, "questions": {name: file}}
        if not given.get("tasks") and not given.get("questions"):
            raise UserError("missing", key="tasks", hint="names of lm-eval's tasks, task files, or `questions: FILE`")
        if not isinstance(given.get("tasks"), list):
            return given
        common = {name: given[name] for name in How.model_fields if name in given}
        return {**given, "tasks": [task for item in given["tasks"] for task in _spelled_out(item, common)]}

    @model_validator(mode="after")
    def _questions_have_columns(self) -> "TasksConfig":
        """The first rows of each file of questions can be asked."""
        for path in self.questions.values():
            if path.exists() and not hub.is_reference(path):
                from eval.measuring import questions

                questions.check(path)
        return self

    @model_validator(mode="after")
    def _with_datasets(self) -> "TasksConfig":
        """The data sets and files of the hub that the tasks read."""
        told = list(told_of(self))
        found = {"datasets": _datasets(self, told), "data": _data(self, told)}
        return self.model_copy(update=found) if found != {"datasets": self.datasets, "data": self.data} else self


def _spelled_out(item: Any, common: Mapping[str, Any]) -> Iterator[Any]:
    """An entry of `tasks` as mappings with the tasks' files and all keys; what is none is left to pydantic."""
    if isinstance(item, Asked):
        yield item.model_dump()
        return
    own = dict(item) if isinstance(item, dict) else {"task": item}
    if not isinstance(own.get("task"), str | os.PathLike):
        yield item
        return
    for file in _files_of(str(own["task"])):
        yield {**common, **own, "task": str(file)}


def _files_of(name: str) -> list[Path]:
    """The task files that a name or a path stands for.

    Raises:
        UserError: it is unknown.
    """
    if hub.is_reference(name):
        raise UserError(f"{name!r}: task files are code, and not fetched", key="tasks", hint="download it yourself")
    if name.startswith("$") or name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return [Path(name)]
    known = catalog.entries()
    names = fnmatch.filter(known, name) if any(sign in name for sign in "*?[") else [name]
    found: dict[str, None] = {}
    for one in names:
        if one not in known:
            hint = nearest(name, list(known)) if known else "lm-eval is not installed"
            raise UserError(f"no task, group, tag or file {name!r}", key="tasks", hint=hint)
        tagged = known[one].members if known[one].kind == "tag" else (one,)
        found |= dict.fromkeys(known[task].file for task in tagged if task in known)
    if not found:
        raise UserError(f"no task is named like {name!r}", key="tasks")
    return [Path(file) for file in found]


def told_of(config: TasksConfig) -> Iterator[dict[str, Any]]:
    """The keys of each task that is asked, those in groups among them."""
    for asked in config.tasks:
        if Path(asked.task).is_file():  # of a file that is not there, the plan will say so
            yield from (told for _, told in task_files.contents(asked.task).tasks.values())


def _datasets(config: TasksConfig, tasks: list[dict[str, Any]]) -> dict[str, Input]:
    """The folder of each data set of the hub that the tasks read; of one that is not here, its reference."""
    found = dict(config.datasets)
    reads: dict[str, Reads] = {}
    for told in tasks:
        name = told.get("dataset_path")
        if not isinstance(name, str) or name in task_files.BUILDERS or name in config.datasets:
            continue
        if folder := _folder_of(name, config.data_dir):
            found[name] = Input(folder)
            continue
        reads[name] = reads.get(name, Reads()) | {_read(told)}
        revision = (told.get("dataset_kwargs") or {}).get("revision")
        text = f"{hub.PREFIX}datasets/{name}" + (f"@{quote(str(revision), safe='')}" if revision else "")
        if str(found.get(name, text)) != text:
            problem = f"tasks read two revisions of {name}: {found[name]} and {text}"
            raise UserError(problem, key="tasks", hint=f"`datasets: {{{name}: …}}` says which one is read")
        found[name] = data_set = DataSet(text)
        data_set.reads = reads[name]
    return found


def _data(config: TasksConfig, tasks: list[dict[str, Any]]) -> dict[str, Input]:
    """The files that the tasks read, with a reference for each that a task's file names as one of the hub."""
    named = [str(one) for told in tasks for one in _patterns(told) if str(one).startswith(HF)]
    return {**{name: Input(hub.PREFIX + name.removeprefix(HF)) for name in named}, **config.data}


def _read(told: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """The subset of its data set that a task reads, and the patterns of files that it gives, if any."""
    name = told.get("dataset_name")
    return None if name is None else str(name), tuple(sorted(map(str, _patterns(told))))


def _patterns(told: Mapping[str, Any]) -> list[Any]:
    """The patterns of files that a task gives."""
    given = (told.get("dataset_kwargs") or {}).get("data_files") or []
    by_split = given.values() if isinstance(given, dict) else [given]
    return [one for some in by_split for one in (some if isinstance(some, list) else [some])]


def _folder_of(name: str, data_dir: str | None) -> Path | None:
    """Where a data set lies in the current folder or in `data_dir`; None where it does not.

    Raises:
        UserError: there is no such `data_dir`.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UserError(f"no folder {data_dir!r}", key="data_dir")
    within = [] if data_dir is None else [Path(data_dir) / name, Path(data_dir) / "datasets" / name]
    places = (Path(name), *within)
    return next((place for place in places if place.is_dir()), None)
