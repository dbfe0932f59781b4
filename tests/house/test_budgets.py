"""A file fits in the head and a function on a screen; what doesn't says why, beside its first line."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for package in ("cordee", "pretrain", "posttrain", "eval", "data", "examples")
    for path in (ROOT / package).rglob("*.py")
)
FILE_LINES, FUNCTION_LINES = 400, 60


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_keep_their_budget(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= FILE_LINES or "long because" in lines[0]
    for function in functions(ast.parse("\n".join(lines))):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= FUNCTION_LINES or "long because" in lines[function.lineno - 1], function.name


def test_the_budget_sees_what_is_over_it():
    long = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
    assert [(node.end_lineno or 0) - node.lineno + 1 for node in functions(ast.parse(long))] == [FUNCTION_LINES + 1]


def test_mypy_and_the_import_contracts_see_every_package():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"udhr"}
    assert packages == set(tools["mypy"]["packages"]) == set(tools["importlinter"]["root_packages"])


def test_no_test_module_imports_another() -> None:
    """Two folders have modules of one name: which one is found depends on what was collected before."""
    found = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith(("from test_", "import test_"))
    ]
    assert found == []


def test_make_runs_every_folder_of_tests() -> None:
    """They are listed in the Makefile, in the order in which they are run."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ntest:")[2].partition("\n\n")[0]
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders - {"house"} == {word.removeprefix("tests/") for word in recipe.split() if word.startswith("tests/")}
