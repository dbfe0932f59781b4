"""YAML 1.2: `no` is a string (a language code), `1e-3` a number, and a duplicate key is an error."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from cordee.errors import UserError, nearest


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2, without duplicate keys."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        # before merge keys (`<<: *x`) are applied, so that overriding a merged key is no duplicate
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key, _ in reversed(node.value):
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
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
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: the text is not valid.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - the loader is a SafeLoader
    except (ValueError, KeyError, AttributeError) as error:  # PyYAML's own, for a word such as `!!int x`
        raise yaml.YAMLError(f"a value is not what its tag says ({error})") from error


def inline(value: Any) -> str:
    """A value as YAML in one line; a text is quoted unless it reads as itself anywhere."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{inline(name)}: {inline(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline, value))}]"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_./$][\w./+@$-]*(:[\w./+@-]+)?", value)
    return value if plain and parse(value) == value else json.dumps(value, ensure_ascii=False)


def read(file: Path, *, key: str | None = None) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; `key` is the key that named the file, for the error.

    Raises:
        UserError: the file is missing, or is not UTF-8, not YAML or not a mapping.
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
    """The line of an error (0 if unknown) and its message."""
    if isinstance(error, yaml.MarkedYAMLError):
        return error.problem_mark.line + 1 if error.problem_mark else 0, str(error.problem)
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return line, f"character U+{error.character:04X} is not allowed"
    return 0, str(error)
