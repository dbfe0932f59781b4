"""Every YAML that is shipped is found and loaded, and every recipe has a tiny twin that runs in the tests."""

from pathlib import Path

import pytest
import yaml

from cordee import recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs" / "recipes").rglob("*.yaml"))
SHIPPED = sorted(path for room in ("configs", "eval") for path in (ROOT / room).rglob("*.y*ml"))


def test_all_yaml_files_are_found():
    assert (len(RECIPES), len(SHIPPED)) == (2, 12)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_yaml_is_a_mapping(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_recipe_is_right(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert recipe.load(path).stages


@pytest.mark.parametrize("path", [path for path in RECIPES if path.parent.name != "tiny"], ids=lambda path: path.stem)
def test_a_recipe_has_a_tiny_twin_with_the_same_stages(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    whole, tiny = recipe.load(path), recipe.load(path.parent / "tiny" / path.name)
    assert [(item.name, item.stage.uses, item.needs) for item in whole.stages] == [
        (item.name, item.stage.uses, item.needs) for item in tiny.stages
    ]
