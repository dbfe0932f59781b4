"""No key is for nothing: each one changes the plan's identity or is marked as execution, and is read."""

import ast
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cordee import identity, stage
from cordee.config import Config, Input, config_in, is_execution

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (*stage.STAGE_PACKAGES, "udhr")
STAGES = [uses for uses, _ in stage.find(*PACKAGES)]
KEYS = [(uses, name) for uses in STAGES for name in stage.load(uses).config.model_fields]


def reached(uses: str, *roots: Path) -> Iterator[ast.Module]:
    """A stage's own module and all that it imports of this project, however deep in a function."""
    roots = roots or (ROOT, ROOT / "examples" / "udhr")
    seen, coming = set(), [uses]
    while coming:
        name = coming.pop()
        path = next((path for root in roots if (path := root / f"{name.replace('.', '/')}.py").exists()), None)
        if name in seen or not path:
            continue
        seen.add(name)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield tree
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                coming += [item.name for item in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                coming += [node.module, *(f"{node.module}.{item.name}" for item in node.names)]


def holders(tree: ast.Module, kinds: frozenset[str]) -> set[str]:
    """What a module calls a config: what it annotates as one, and what it loops over of one."""
    annotated = {
        node.arg if isinstance(node, ast.arg) else getattr(node.target, "id", "")
        for node in ast.walk(tree)
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation and ast.unparse(node.annotation) in kinds
    }
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.comprehension)]
    looped = {
        target.id
        for loop in loops
        if any(isinstance(node, ast.Name) and node.id in annotated for node in ast.walk(loop.iter))
        for target in ast.walk(loop.target)
        if isinstance(target, ast.Name)
    }
    return annotated | looped


def names_read_in(tree: ast.Module, kinds: frozenset[str]) -> Iterator[str]:
    """The attributes of configs of these classes that some line reads; a validator's reading is none."""
    called = holders(tree, kinds)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name in kinds]
    methods = [node for one in classes for node in one.body if isinstance(node, ast.FunctionDef)]
    read = [one for one in methods if {ast.unparse(name) for name in one.decorator_list} <= {"property"}]
    own = {id(node) for method in read for node in ast.walk(method)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            holder = node.value
            name = holder.attr if isinstance(holder, ast.Attribute) else getattr(holder, "id", "")
            if name in called or (name == "self" and id(node) in own):
                yield node.attr


@functools.cache
def read_names(uses: str) -> frozenset[str]:
    """The keys that a stage, or what it imports, reads."""
    config = stage.load(uses).config
    kinds = frozenset(one.__name__ for inner in (config, *nested(config)) for one in inner.__mro__)
    return frozenset(name for tree in reached(uses) for name in names_read_in(tree, kinds))


@pytest.mark.parametrize("uses", STAGES)
def test_a_stage_states_the_version_of_its_results(uses):
    assert isinstance(importlib.import_module(uses).VERSION, int)


@pytest.mark.parametrize(("uses", "name"), KEYS)
def test_a_key_is_part_of_the_identity_or_marked(uses, name):
    config = stage.load(uses).config
    values: dict[str, Any] = dict.fromkeys(config.model_fields, 0)
    one = identity.of_stage(uses, 0, config.model_construct(**values), {})
    other = identity.of_stage(uses, 0, config.model_construct(**{**values, name: 1}), {})
    assert (one != other) != is_execution(config, name)
    marked = identity.execution(config.model_construct(**{**values, name: 1})) if is_execution(config, name) else {}
    assert bool(marked) == is_execution(config, name)


@pytest.mark.parametrize(("uses", "name"), KEYS)
def test_a_key_is_read_by_its_package(uses, name):
    assert name in read_names(uses)


def nested(config: type[Config]) -> set[type[Config]]:
    found = {inner for field in config.model_fields.values() if (inner := config_in(field.annotation))}
    return found | {deeper for inner in found for deeper in nested(inner)}


@pytest.mark.parametrize("uses", STAGES)
def test_a_key_in_a_nested_mapping_is_read_too(uses):
    names = read_names(uses)
    for inner in nested(stage.load(uses).config):
        assert set(inner.model_fields) <= names


@pytest.mark.parametrize(("uses", "name"), KEYS)
def test_a_key_says_what_it_means(uses, name):
    assert stage.load(uses).config.model_fields[name].description


PLANTED = """
from pydantic import model_validator
from cordee.config import Config as Keys
from trl import DPOConfig
from posttrain import part, stranger


class Source(Keys):
    path: str
    looped: str


class Config(Keys):
    data: list[Source]
    by_run: int
    by_part: int
    by_method: int
    by_validator: int
    set_only: int
    by_trl: int
    by_stranger: int

    @model_validator(mode="after")
    def _fits(self):
        return self.by_validator and self

    def due(self):
        return self.by_method


def run(config: Config, settings: DPOConfig):
    config.set_only = settings.by_trl
    return config.by_run, [source.looped for _, source in enumerate(config.data)], part.work(config)
"""
PARTS = {
    "part": "def work(config: Config): return config.by_part",
    "stranger": "class Other:\n    def work(self): return self.by_stranger",
    "sft": "def run(config: Config): return config.by_validator",
}


def test_a_key_that_nothing_reads_is_seen(tmp_path):
    """Not by a validator, nor by another stage, nor by what has a field of that name and is no config of the stage."""
    (tmp_path / "posttrain").mkdir()
    for name, text in {"planted": PLANTED, **PARTS}.items():
        (tmp_path / "posttrain" / f"{name}.py").write_text(text)
    read = {
        name
        for tree in reached("posttrain.planted", tmp_path)
        for name in names_read_in(tree, frozenset({"Config", "Source"}))
    }
    assert read == {"data", "looped", "by_run", "by_part", "by_method"}


def test_an_input_stands_in_the_identity_by_its_content():
    class Some(Config):
        model: Input

    made = identity.of_stage("x", 0, Some(model="a"), {"model": "content 1"})
    assert made["config"] == {"model": "content 1"}
