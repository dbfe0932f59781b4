"""The package as its user has it: installed, named in a recipe, planned, run and found again by its lineage."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
RECIPE = f"""
name: own
seed: 1
stages:
  corpus: {{uses: pretrain.corpus, source: {ROOT}/data/udhr.parquet, languages: [de, fr, it, el],
           holdout: {{article: [29, 30]}}}}
  chats: {{uses: udhr.chats, corpus: $corpus, chats_per_language: {{language: 3}}, preferences_per_language: 1}}
"""


@pytest.fixture
def cordee(tmp_path):
    """Runs the command line in a folder that is not the repository."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def call(*arguments, path=""):
        command = [sys.executable, "-P", "-c", "from cordee.cli import main; main()", *arguments]
        environment = {**os.environ, "COLUMNS": "200"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return call


def test_its_stage_is_planned_run_and_traced_back_like_any_other(cordee, tmp_path):
    planned = cordee("plan", "recipe.yaml")
    assert "udhr.chats" in planned.stdout, planned.stderr
    done = cordee("run", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "runs/own/chats@1/manifest.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (manifest["uses"], manifest["metrics"]["rows"]) == ("udhr.chats", 12)
    assert manifest["git"]["commit"] == head.strip(), "of the repository that holds the stage's module"
    assert "data/udhr.parquet" in cordee("lineage", "own/chats@1").stdout
    assert "published" not in cordee("run", "recipe.yaml").stdout, "nothing is run twice"


def test_its_stages_and_their_keys_are_listed(cordee):
    assert cordee("list", "udhr").stdout.startswith("udhr.chats ")
    assert "\nchats_per_language: mapping of" in cordee("list", "udhr.chats").stdout
    wrong = cordee("list", "udhr.chat")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "cordee: command line: no stage 'udhr.chat'; did you mean 'udhr.chats'?\n",
    )


def test_a_misspelt_key_of_it_is_one_line(cordee):
    wrong = cordee("plan", "recipe.yaml", "chats.chats_per_langauge={language: 3}")
    assert wrong.returncode == 2
    assert "did you mean 'chats_per_language'?" in wrong.stderr


def test_the_stage_in_the_readme_runs_from_pythonpath(cordee, tmp_path):
    readme = (ROOT / "examples" / "udhr" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "code" / "mine").mkdir(parents=True)
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    (tmp_path / "code" / "mine" / "longer.py").write_text(code, encoding="utf-8")
    stage = "  long: {uses: mine.longer, corpus: $corpus, characters: 200}\n"
    (tmp_path / "recipe.yaml").write_text(RECIPE + stage)
    done = cordee("run", "recipe.yaml", path=str(tmp_path / "code"))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "runs/own/long@1/manifest.json").read_text())
    assert 0 < manifest["metrics"]["rows"] < 120
    assert "characters: int, >= 1" in cordee("list", "mine.longer", path=str(tmp_path / "code")).stdout
