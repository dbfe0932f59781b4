"""No key is for nothing: each one changes the plan's identity or is marked as execution, and is read."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cordee import identity, stage
from cordee.config import Config, Input, is_execution
from cordee.recipe import _config_in

ROOT = Path(__file__).resolve().parents[2]
STAGES = [uses for uses, _ in stage.find()]
KEYS = [(uses, name) for uses in STAGES for name in stage.load(uses).config.model_fields]


HOLDERS = {"config", "settings", "self", "launch", "source"}
"""What a config is called where its keys are read; `self` is one in a config's own methods."""


def reached(uses: str) -> Iterator[ast.Module]:
    """A stage's own module and all that it imports of this project, however deep in a function."""
    seen, coming = set(), [uses]
    while coming:
        name = coming.pop()
        path = ROOT / f"{name.replace('.', '/')}.py"
        if name in seen or not path.exists():
            continue
        seen.add(name)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield tree
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                coming += [item.name for item in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                coming += [node.module, *(f"{node.module}.{item.name}" for item in node.names)]


def names_read_in(tree: ast.Module) -> Iterator[str]:
    """The attributes of configs that some line reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            holder = node.value
            called = holder.attr if isinstance(holder, ast.Attribute) else getattr(holder, "id", "")
            if called in HOLDERS:
                yield node.attr


@functools.cache
def read_names(uses: str) -> frozenset[str]:
    """The keys that a stage, or what it imports, reads."""
    return frozenset(name for tree in reached(uses) for name in names_read_in(tree))


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
def test_a_key_is_read_by_its_room(uses, name):
    assert name in read_names(uses)


def nested(config: type[Config]) -> set[type[Config]]:
    found = {inner for field in config.model_fields.values() if (inner := _config_in(field.annotation))}
    return found | {deeper for inner in found for deeper in nested(inner)}


@pytest.mark.parametrize("uses", STAGES)
def test_a_key_in_a_nested_mapping_is_read_too(uses):
    names = read_names(uses)
    for inner in nested(stage.load(uses).config):
        assert set(inner.model_fields) <= names


@pytest.mark.parametrize(("uses", "name"), KEYS)
def test_a_key_says_what_it_means(uses, name):
    assert stage.load(uses).config.model_fields[name].description


def test_a_key_that_only_another_stage_reads_is_seen():
    assert "max_prompts" in read_names("eval.generate")
    assert "max_prompts" not in read_names("eval.benchmark")
    assert "learning_rate" not in set(names_read_in(ast.parse("other.learning_rate\nconfig.learning_rate = 1")))


def test_an_input_stands_in_the_identity_by_its_content():
    class Some(Config):
        model: Input

    made = identity.of_stage("x", 0, Some(model="a"), {"model": "content 1"})
    assert made["config"] == {"model": "content 1"}
