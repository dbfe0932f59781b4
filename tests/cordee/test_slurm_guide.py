"""Every command that the guide to GPUs and Slurm shows is one that a plan accepts, on a cluster that is shipped."""

import re
import shlex
from pathlib import Path

import pytest

from cordee import cluster, recipe

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8").replace("\\\n", " ")
COMMANDS = re.findall(r"^    cordee (\w+) (.+?)(?: *#.*)?$", GUIDE, re.MULTILINE)


def test_the_guide_has_commands():
    assert [verb for verb, _ in COMMANDS] == ["run", "run", "run", "run", "status", "logs", "cancel"]


@pytest.mark.parametrize(("verb", "words"), COMMANDS)
def test_a_command_of_the_guide_is_accepted(verb, words, monkeypatch, cordee):
    monkeypatch.chdir(ROOT)
    file, *others = shlex.split(words)
    overrides = [word for word in others if "=" in word]
    stages = {item.name: item.config for item in recipe.load(Path(file), overrides).stages}
    if overrides:
        assert stages["base"].launch.num_processes == 4
    if "--cluster" in others:
        assert cluster.load(others[others.index("--cluster") + 1]).kind == "slurm"
    if verb == "logs":
        assert others[0] in stages
    assert cordee(verb, "--help").returncode == 0


def test_the_guide_names_every_shipped_cluster_and_every_key_of_resources():
    shipped = {path.stem for path in (ROOT / "configs/clusters").glob("*.yaml")}
    assert shipped <= set(re.findall(r"`([\w-]+)`", GUIDE))
    from cordee.resources import Resources

    assert set(Resources.model_fields) == set(re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE))
