"""Which tasks a benchmark asks and how: lm-eval's names, its files or one's own, each with keys of its own."""

import fnmatch
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from cordee.config import Config, Execution, Input
from cordee.errors import UserError, nearest
from eval.measuring import catalog, task_files
from eval.measuring.task_files import TaskFile

Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""A name that can be a folder's or a file's."""


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
    """A folder in which the hub's data sets lie by their names (`openai/gsm8k`); without it, the cache of
    huggingface_hub."""
    datasets: dict[str, Input] = Field(default={})
    """The folder of each data set of the hub that a task reads; what is not given is looked for in `data_dir`."""

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
    def _with_datasets(self) -> "TasksConfig":
        """The folders of all data sets that the tasks read."""
        found = _datasets(self)
        return self if found == self.datasets else self.model_copy(update={"datasets": found})


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


def _datasets(config: TasksConfig) -> dict[str, Input]:
    """The folder of each data set of the hub that the tasks read.

    Raises:
        UserError: some are not there: names them and the tasks.
    """
    found = dict(config.datasets)
    absent: dict[str, str] = {}
    for asked in config.tasks:
        # of a file that is not there, the plan will say so
        for name, (_, told) in task_files.contents(asked.task).tasks.items() if Path(asked.task).is_file() else ():
            path = told.get("dataset_path")
            if not isinstance(path, str) or path in task_files.BUILDERS or path in found:
                continue
            if folder := _folder_of(path, config.data_dir):
                found[path] = Input(folder)
            else:
                absent.setdefault(path, name)
    if absent:
        first = ", ".join(f"{path} (task {task})" for path, task in list(absent.items())[:3])
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        where = f"in {config.data_dir}" if config.data_dir else "in the cache of huggingface_hub"
        hint = "`data_dir:` names a folder with the hub's data sets by their names, `datasets:` the folder of each"
        raise UserError(f"not {where}: {first}{more}", key="tasks", hint=hint)
    return found


def _folder_of(name: str, data_dir: str | None) -> Path | None:
    """Where a data set of the hub lies: a folder of that path, that in `data_dir`, or the newest in the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    if data_dir is not None:
        folder = Path(data_dir) / name
        return folder if folder.is_dir() else None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"datasets--{name.replace('/', '--')}"
    main = cache / "refs" / "main"
    if not main.is_file():
        return None
    folder = cache / "snapshots" / main.read_text(encoding="utf-8").strip()
    return folder if folder.is_dir() else None
