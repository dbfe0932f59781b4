"""No key is for nothing: each one changes the plan's identity or is marked as execution, and is read."""

import ast
from pathlib import Path
from typing import Any

import pytest

from cordee import identity, stage
from cordee.config import Config, Input, is_execution
from cordee.recipe import _config_in

ROOT = Path(__file__).resolve().parents[2]
STAGES = [uses for uses, _ in stage.find()]
KEYS = [(uses, name) for uses in STAGES for name in stage.load(uses).config.model_fields]


def read_names(*roots: str) -> set[str]:
    """Every attribute that some line of these packages reads."""
    found = set()
    for root in roots:
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    found.add(node.attr)
    return found


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
    assert name in read_names(uses.partition(".")[0], "cordee")


def nested(config: type[Config]) -> set[type[Config]]:
    found = {inner for field in config.model_fields.values() if (inner := _config_in(field.annotation))}
    return found | {deeper for inner in found for deeper in nested(inner)}


@pytest.mark.parametrize("uses", STAGES)
def test_a_key_in_a_nested_mapping_is_read_too(uses):
    names = read_names(uses.partition(".")[0], "cordee")
    for inner in nested(stage.load(uses).config):
        assert set(inner.model_fields) <= names


@pytest.mark.parametrize(("uses", "name"), KEYS)
def test_a_key_says_what_it_means(uses, name):
    assert stage.load(uses).config.model_fields[name].description


def test_a_key_that_nothing_reads_is_seen():
    assert "a_key_that_nothing_reads" not in read_names("cordee", "pretrain", "posttrain", "eval")


def test_an_input_stands_in_the_identity_by_its_content():
    class Some(Config):
        model: Input

    made = identity.of_stage("x", 0, Some(model="a"), {"model": "content 1"})
    assert made["config"] == {"model": "content 1"}
