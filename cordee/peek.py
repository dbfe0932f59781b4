"""Reads the fields of a library's dataclass from its source, without importing it (torch alone takes seconds)."""

import ast
import functools
import importlib.util
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee.errors import Fault

_NAMES: dict[str, Any] = {
    **{kind.__name__: kind for kind in (bool, int, float, str, list, dict, tuple, set)},
    **{name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union")},
    "Path": Path,
}


@functools.cache
def dataclass_fields(dataclass_name: str) -> dict[str, Any]:
    """The fields of `package.Class`, its bases' included: name → type, `Any` where only the library knows it.

    Raises:
        Fault: the package is not installed or holds no such class.
    """
    package, _, name = dataclass_name.rpartition(".")
    root = source_of(package)
    if root is None:
        raise Fault(f"{package} is not installed, so its settings can't be checked", hint="pip install 'cordee[train]'")
    fields = dict(_fields(root, name))
    if not fields:
        raise Fault(f"{package} is installed, but holds no {name}", hint="use the versions that requirements.txt pins")
    return fields


def functions(module: str) -> list[str]:
    """The public functions of a module, in their order, read from its source.

    Raises:
        Fault: there is no such module.
    """
    file = source_of(module)
    if file is None:
        raise Fault(f"there is no module {module}")
    return [node.name for node in _parse(file).body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a function, as its source spells it."""

    kind: Any
    """Its type, `Any` where only the module knows it; of a path, `Path`."""
    is_required: bool
    is_keyword: bool
    """Whether it can be given by its name only."""


def parameters(module: str, name: str) -> dict[str, Parameter] | None:
    """The parameters of a module's function, which the module defines or imports, by name; None if there is none.

    Raises:
        Fault: there is no such module.
    """
    file = source_of(module)
    if file is None:
        raise Fault(f"there is no module {module}")
    found = _function(file, name)
    if found is None:
        return None
    given, named = found.args, found.args.kwonlyargs
    plain = [*given.posonlyargs, *given.args]
    without: list[ast.expr | None] = [None] * (len(plain) - len(given.defaults))
    defaults = [*without, *given.defaults, *given.kw_defaults]
    return {
        one.arg: Parameter(_type(ast.unparse(one.annotation)) if one.annotation else Any, default is None, one in named)
        for one, default in zip([*plain, *named], defaults, strict=True)
    }


def _function(file: Path, name: str) -> ast.FunctionDef | None:
    """The definition of a function that a file defines or imports."""
    tree = _parse(file)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    for statement in ast.walk(tree):
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if name == (alias.asname or alias.name) and (source := _imported_from(statement, file)):
                    return _function(source, alias.name) if source != file else None
    return None


def members(enum: str) -> set[str]:
    """The words of an enumeration, `package.module.Class`, read from its source; none where it is not there."""
    module, _, name = enum.rpartition(".")
    file = source_of(module)
    found = (node for node in (_parse(file).body if file else []) if isinstance(node, ast.ClassDef))
    values = (item.value for node in found if node.name == name for item in node.body if isinstance(item, ast.Assign))
    return {value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)}


def _fields(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    """The annotated fields of a class that a file defines or imports; bases first, so a subclass's type wins."""
    tree = _parse(file)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for base in node.bases:
                if isinstance(base, ast.Name):
                    yield from _fields(file, base.id)
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield item.target.id, _type(ast.unparse(item.annotation))
            return
    for statement in ast.walk(tree):
        if isinstance(statement, ast.ImportFrom) and any(name == alias.name for alias in statement.names):
            if (source := _imported_from(statement, file)) is not None:
                yield from _fields(source, name)
            return


@functools.cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _imported_from(statement: ast.ImportFrom, file: Path) -> Path | None:
    """The file that `from module import …` reads, or None for the standard library's."""
    if not statement.level:
        return source_of(statement.module or "")
    module = file.parents[statement.level - 1].joinpath(*(statement.module or "").split("."))
    return next((path for path in (module.with_suffix(".py"), module / "__init__.py") if path.exists()), None)


def source_of(module: str) -> Path | None:
    """A module's source file, found without importing the module; None if there is none."""
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    if not spec.submodule_search_locations:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") and not rest else None
    path = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def _type(annotation: str) -> Any:
    """The type that an annotation spells, where it is made of built-in names only."""
    try:
        return eval(annotation.strip("'\""), {"__builtins__": {}}, _NAMES)  # noqa: S307 - the installed library's source
    except (NameError, SyntaxError, TypeError, AttributeError):
        return Any


def is_installed(package: str) -> bool:
    """Whether a package can be imported here."""
    return importlib.util.find_spec(package) is not None
