"""What an lm-eval task file reads, found in its text: a plan must not import lm-eval."""

from pathlib import Path

import yaml

from cordee import peek
from cordee.config import Input
from cordee.errors import UserError


class TaskFile(Input):
    """An lm-eval task file; the files that it includes and the modules whose functions it names count with it."""

    def further_files(self) -> list[Path]:
        """These files; what the modules import is not among them.

        Raises:
            UserError: a file that it includes is not there, or one of them is no task file.
        """
        tasks, modules = [Path(self).resolve()], []
        for task in tasks:  # those that it includes come to the end of the list
            included, named = _read(task)
            tasks += [path for path in included if path not in tasks]
            modules += named
        return [*tasks[1:], *modules]


def _read(file: Path) -> tuple[list[Path], list[Path]]:
    """The files that a task file includes, and the source files of the functions that it names, as lm-eval finds them.

    A function's module is a file beside the task file or, where there is none, one that Python imports; what has no
    source is left out.
    """
    functions: list[str] = []

    class Loader(yaml.SafeLoader):
        """Keeps the names of functions."""

    Loader.add_constructor("!function", lambda _loader, node: functions.append(str(node.value)))
    try:
        config = yaml.load(file.read_bytes(), Loader=Loader)  # noqa: S506 - the loader is a SafeLoader
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
    return list(included.values()), [path for path in sources if path]
