"""What lm-eval's task files read, found in their texts: a plan must not import lm-eval."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cordee import peek
from cordee.config import Input
from cordee.errors import UserError
from eval.measuring import catalog

BUILDERS = {"json", "csv", "parquet", "arrow", "text", "xml", "pandas", "webdataset", "imagefolder", "audiofolder"}
"""What `dataset_path` names where a task's data are files; anything else is a data set of the hub, or a folder."""


class TaskFile(Input):
    """An lm-eval task file, or that of a group.

    The files that it includes, the modules whose functions it names, and a group's tasks count with it.
    """

    def further_files(self) -> list[Path]:
        """These files; what the modules import is not among them.

        Raises:
            UserError: a file that it includes is not there, one of them is no task file, or a group's task is unknown.
        """
        found = [Path(self).resolve()]
        modules: list[Path] = []
        for file in found:  # those that it includes come to the end of the list
            config, included, named = _read(file)
            found += [path for path in (*included, *_members(file, config)) if path not in found]
            modules += [path for path in named if path not in modules]
        return [*found[1:], *modules]


@dataclass
class Contents:
    """What a task file, or a group's, asks for."""

    tasks: dict[str, tuple[Path, dict[str, Any]]] = field(default_factory=dict)
    """By name, each task's file and keys."""
    groups: dict[str, Path] = field(default_factory=dict)
    """By name, the file of the group, if it is one, and those of the groups in it."""


def contents(file: Path) -> Contents:
    """The task of a file, or the tasks and groups of a group.

    Raises:
        UserError: one can't be read.
    """
    found, coming = Contents(), [file]
    for path in coming:  # the members of a group come to the end of the list
        config = merged(path)
        if "group" in config and "class" not in config:
            found.groups[str(config["group"])] = path
            coming += [member for member in _members(path, config) if member not in coming]
        elif not isinstance(config.get("task"), str):
            raise UserError("is no task file: it has no task", file=path, key="tasks")
        else:
            found.tasks[config["task"]] = (path, config)
    return found


def merged(file: Path) -> dict[str, Any]:
    """A task file's keys with those of the files that it includes below them; functions as their names.

    Raises:
        UserError: one is not there, or is no task file.
    """
    return _merged(file.resolve(), ())


def _merged(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    config, included, _ = _read(file)
    whole: dict[str, Any] = {}
    for path in included:
        if path not in above:
            whole |= _merged(path, (*above, file))
    return whole | {name: value for name, value in config.items() if name != "include"}


def _members(file: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """The files of a group's members: those beside the group's, else lm-eval's own.

    Raises:
        UserError: a name is unknown.
    """
    names = list(catalog.members(config)) if "group" in config else []
    if not names:
        return
    known = catalog.entries()
    if not any(entry.file == str(file) for entry in known.values()):
        known = {**known, **catalog.of_files(file.parent.glob("*.yaml"))}
    while names:
        name = names.pop(0)
        if name not in known:
            raise UserError(f"no task {name!r}", file=file, key="task")
        if known[name].kind == "tag":
            names += known[name].members
        else:
            yield Path(known[name].file)


def _read(file: Path) -> tuple[dict[str, Any], list[Path], list[Path]]:
    """A task file's own keys, the files that it includes, and the source files of the functions that it names.

    A function's module is a file beside the task file or, where there is none, one that Python imports; what has no
    source is left out.
    """
    functions: list[str] = []

    class Loader(catalog.LOADER):  # type: ignore[misc, valid-type]
        """Keeps the names of functions."""

    def name_of(_loader: object, node: yaml.ScalarNode) -> str:
        functions.append(str(node.value))
        return str(node.value)

    Loader.add_constructor("!function", name_of)
    try:
        config = yaml.load(file.read_bytes(), Loader=Loader)  # noqa: S506 - the loader is a safe one
    except (OSError, yaml.YAMLError, ValueError, KeyError, AttributeError) as error:  # the last are PyYAML's own
        problem = " ".join(str(error).split())
        raise UserError(f"is no task file: {problem}", file=file, key="tasks") from error
    if not isinstance(config, dict):
        raise UserError("is no task file: it holds no mapping", file=file, key="tasks")
    named = config.get("include", [])
    included = {
        str(name): (file.parent / str(name)).resolve() for name in (named if isinstance(named, list) else [named])
    }
    for name, path in included.items():
        if not path.is_file():
            raise UserError(f"no file {name!r}", file=file, key="include")
    modules = {name.rpartition(".")[0] for name in functions} - {""}
    beside = {name: file.parent / f"{name.replace('.', '/')}.py" for name in sorted(modules)}
    sources = [path if path.is_file() else peek.source_of(name) for name, path in beside.items()]
    return config, list(included.values()), [path for path in sources if path]
