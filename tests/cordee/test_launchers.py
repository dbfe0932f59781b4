"""What starts a stage: the command for one process and for several, and where compiled code is kept."""

import json
import subprocess
import sys

import pytest
from toys import choir, kept, spring

from cordee import yaml12
from cordee.artifact import Store
from cordee.launchers import caches, command

PLAIN = (sys.executable, "-m")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")


@pytest.fixture
def unset(monkeypatch):
    """No place for compiled code is set by whoever runs the tests."""
    for name in kept.NAMES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_plain_python(tmp_path):
    job = tmp_path / "job.json"
    for uses, config in (("toys.spring", spring.Config()), ("toys.choir", choir.Config())):
        assert command.of_stage(uses, config, job) == (*PLAIN, uses, "--job", str(job))
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_started_by_accelerate_with_settings_of_their_own(tmp_path):
    job, settings = tmp_path / "job.json", tmp_path / "accelerate.yaml"
    config = choir.Config.model_validate({"launch": {"num_processes": 3}})
    options = ("--config_file", str(settings), "--num_processes", "3")
    assert command.of_stage("toys.choir", config, job) == (*ACCELERATE, *options, "-m", "toys.choir", "--job", str(job))
    written = yaml12.read(settings)
    assert (written["num_processes"], written["num_machines"], written["mixed_precision"]) == (3, 1, "no")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_configuration_of_the_users_is_given_to_accelerate_as_it_is(tmp_path, write, num_processes):
    file = str(write("mine.yaml", "use_cpu: true\n"))
    config = choir.Config.model_validate({"launch": {"num_processes": num_processes, "config_file": file}})
    argv = command.of_stage("toys.choir", config, tmp_path / "job.json")
    assert argv[:7] == (*ACCELERATE, "--config_file", file, "--num_processes", str(num_processes))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.usefixtures("unset")
def test_compiled_code_is_kept_beside_the_runs_at_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs" / ".cache"
    assert Store(tmp_path / "runs").cache == place  # where `cordee clean` looks
    folders = dict(zip(kept.NAMES, ("", "inductor", "triton", "vllm"), strict=True))
    expected = {name: str(place / folder) for name, folder in folders.items()}
    assert caches(tmp_path / "runs") == caches((tmp_path / "runs").relative_to(tmp_path)) == expected


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("name", kept.NAMES)
def test_a_place_that_the_user_has_set_stays(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "/scratch/mine")
    assert set(caches(tmp_path)) == set(kept.NAMES) - {name}


def published(cordee, write, tmp_path):
    """The places that a stage was told by `cordee run`, and alone."""
    write("recipe.yaml", "name: recipe\nstages: {kept: {uses: toys.kept}}")
    write("alone.yaml", "seed: 1\n")  # with the recipe's seed it would be the same artifact
    done = cordee("run", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    alone = [sys.executable, "-m", "toys.kept", "--config", "alone.yaml"]
    subprocess.run(alone, cwd=tmp_path, check=True, capture_output=True)
    return [json.loads((tmp_path / "runs" / name / "kept@1/caches.json").read_text()) for name in ("recipe", "alone")]


@pytest.mark.usefixtures("unset")
def test_a_stage_has_the_same_places_in_a_recipe_and_alone(cordee, write, tmp_path):
    in_recipe, alone = published(cordee, write, tmp_path)
    assert in_recipe == alone == caches(tmp_path / "runs")


@pytest.mark.usefixtures("unset")
def test_a_place_that_the_user_has_set_reaches_the_stage_in_a_recipe_and_alone(cordee, write, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/scratch/mine")
    in_recipe, alone = published(cordee, write, tmp_path)
    assert in_recipe == alone == {**caches(tmp_path / "runs"), "TRITON_CACHE_DIR": "/scratch/mine"}
