"""YAML as version 1.2 has it: `no` is a word (a language's code), `1e-3` a number, and no key stands twice."""

import re
from pathlib import Path
from typing import Any

import yaml

from cordee.errors import UserError, nearest


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema, without keys that stand twice."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        # here every mapping is as it was written: a key that overrides a merged one (`<<: *x`) stands once
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key, _ in reversed(node.value):
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), [*"-+0123456789"])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    [*"-+.0123456789"],
)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)  # at once, so that one within itself is an error


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str) -> Any:
    """The value that a piece of YAML spells.

    Raises:
        yaml.YAMLError: it is none.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - the loader is a SafeLoader
    except (ValueError, KeyError, AttributeError) as error:  # PyYAML's own, for a word such as `!!int x`
        raise yaml.YAMLError(f"a value is not what its tag says ({error})") from error


def read(file: Path, *, key: str | None = None) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; `key` is where the file was named, for the error.

    Raises:
        UserError: it is not there, is no UTF-8, no YAML or no mapping.
    """
    text = ""
    try:
        text = file.read_text(encoding="utf-8")
        value = parse(text)
    except OSError as error:
        beside = [path.name for path in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        hint = nearest(file.name, beside) if beside else ""
        raise UserError(error.strerror or str(error), file=file, key=key, hint=hint) from error
    except UnicodeDecodeError as error:
        raise UserError(f"no UTF-8 at byte {error.start}", file=file, key=key) from error
    except yaml.YAMLError as error:
        line, problem = _explain(error, text)
        raise UserError(f"no valid YAML: {problem}", file=f"{file}:{line}" if line else file, key=key) from error
    if not isinstance(value, dict):
        raise UserError("holds no mapping", file=file, key=key)
    return value


def _explain(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """The line of an error, or 0 where it has none, and what it says."""
    if isinstance(error, yaml.MarkedYAMLError):
        return error.problem_mark.line + 1 if error.problem_mark else 0, str(error.problem)
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return line, f"character U+{error.character:04X} is not allowed"
    return 0, str(error)
