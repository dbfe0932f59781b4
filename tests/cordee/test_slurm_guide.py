"""Every `cordee run` that the guide to GPUs and Slurm shows is one that a plan accepts."""

import re
import shlex
from pathlib import Path

import pytest

from cordee import recipe

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8").replace("\\\n", " ")
RUNS = re.findall(r"^    cordee run (.+)$", GUIDE, re.MULTILINE)


def test_the_guide_has_commands():
    assert len(RUNS) == 2


@pytest.mark.parametrize("command", RUNS)
def test_a_command_of_the_guide_is_accepted(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    file, *overrides = shlex.split(command)
    stages = {item.name: item.config for item in recipe.load(Path(file), overrides).stages}
    assert stages["base"].launch.num_processes == 4


def test_the_chain_of_jobs_names_the_quickstarts_stages_in_their_order(monkeypatch):
    monkeypatch.chdir(ROOT)
    (names,) = re.findall(r"for stage in (.+); do", GUIDE)
    stages = recipe.load(Path("configs/recipes/quickstart.yaml")).stages
    assert names.split() == [item.name for item in stages]
