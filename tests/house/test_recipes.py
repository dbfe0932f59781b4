"""Every YAML that is shipped is loaded by what reads it, and every recipe has a tiny twin that runs in the tests."""

import json
from pathlib import Path

import pytest

from cordee import cluster, recipe
from cordee.config import Launch
from cordee.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs" / "recipes").rglob("*.yaml"))
MODELS, LAUNCHES = (sorted((ROOT / "configs" / name).rglob("*.yaml")) for name in ("models", "accelerate"))
CLUSTERS = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))
SUITES = sorted((ROOT / "configs" / "suites").glob("*.yaml"))
PEERS = sorted((ROOT / "tests" / "cordee" / "importing").rglob("*.yaml"))
TASKS = sorted([*ROOT.glob("eval/tasks/*.yaml"), *ROOT.glob("examples/*/tasks/*.yaml")])


def test_all_yaml_files_are_found():
    shipped = {path for package in ROOT.iterdir() if package.name[0] != "." for path in package.rglob("*.y*ml")}
    assert shipped - set((ROOT / "runs").rglob("*")) == {
        *RECIPES,
        *MODELS,
        *LAUNCHES,
        *CLUSTERS,
        *TASKS,
        *SUITES,
        *PEERS,
    }
    assert [len(found) for found in (RECIPES, MODELS, LAUNCHES, CLUSTERS, TASKS)] == [18, 3, 5, 6, 4]


def read_shape(path, folder):
    from pretrain.training.model import _read_config

    (folder / "tokens.json").write_text(json.dumps({"vocab_size": 8192}))
    return _read_config(path, folder)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_shipped_shape_is_a_model(path, tmp_path):
    shape = read_shape(path, tmp_path)
    assert shape.num_hidden_layers > 0


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_a_shipped_launch_is_one_that_a_training_takes(path):
    from accelerate.commands.config.config_args import load_config_from_file

    from cordee.compute import device

    asked = device._asked(Launch(config_file=str(path)))
    assert asked.cpu == path.stem.startswith("cpu")
    assert asked.sharded == path.stem.startswith("fsdp")
    assert load_config_from_file(str(path)).use_cpu == asked.cpu


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_a_shipped_task_says_what_it_asks_and_reads_data_that_a_recipe_names(path):
    from eval.measuring import task_files

    ((name, (_, told)),) = task_files.contents(path).tasks.items()
    assert name == path.stem
    assert told["metadata"].keys() >= {"version", "chat", "chance", "description"}
    assert set(told["dataset_kwargs"]["data_files"].values()) < {"language", "documents", "gsm8k"}


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_a_shipped_cluster_is_one(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cluster.load(path.stem).kind in ("local", "slurm")


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_shipped_suite_names_what_lm_eval_has(path):
    from eval.measuring import catalog, task_files

    found = task_files.contents(path)
    assert len(found.tasks) >= len(list(catalog.members(catalog.plain(path))))
    assert next(iter(found.groups)) == path.stem


def test_a_yaml_that_is_wrong_is_seen(tmp_path):
    from cordee.compute import device
    from eval.measuring import task_files

    def planted(path, old, new):
        text = path.read_text(encoding="utf-8")
        assert old in text
        (tmp_path / path.name).write_text(text.replace(old, new, 1), encoding="utf-8")
        return tmp_path / path.name

    with pytest.raises(UserError, match="has no field 'hiden_size'; did you mean 'hidden_size'"):
        read_shape(planted(MODELS[0], "hidden_size", "hiden_size"), tmp_path)
    with pytest.raises(UserError, match="is no task file"):
        task_files.contents(planted(TASKS[0], "task: ", "name: "))
    fsdp = next(path for path in LAUNCHES if path.stem == "fsdp2")
    with pytest.raises(UserError, match="must be 2"):
        device._asked(Launch(config_file=str(planted(fsdp, "fsdp_version: 2", "fsdp_version: 1"))))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_recipe_is_right(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert recipe.load(path).stages


WHOLE = [path.relative_to(ROOT / "configs/recipes") for path in RECIPES if "tiny" not in path.parts]


@pytest.mark.parametrize("path", WHOLE, ids=str)
def test_a_recipe_has_a_tiny_twin_with_the_same_stages(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    whole, tiny = recipe.load(Path("configs/recipes", path)), recipe.load(Path("configs/recipes/tiny", path))
    assert [(item.name, item.stage.uses, item.needs) for item in whole.stages] == [
        (item.name, item.stage.uses, item.needs) for item in tiny.stages
    ]


@pytest.mark.parametrize("path", [path for path in WHOLE if path.parent.name == "models"], ids=str)
def test_a_recipe_for_a_model_of_ones_own_is_judged_and_reported_and_its_twin_has_its_keys(path, monkeypatch):
    """But for what says how to compute, and on how much of a benchmark."""
    monkeypatch.chdir(ROOT)
    whole, tiny = (recipe.load(Path(folder, path)) for folder in ("configs/recipes", "configs/recipes/tiny"))
    assert [item.stage.uses for item in whole.stages][-2:] == ["eval.benchmark", "eval.report"]
    apart = {"launch", "tensor_parallel_size", "data_parallel_size", "engine", "limit", "batch_size"}
    for one in whole.stages:
        keys, own = (set(of.document["stages"][one.name]) for of in (whole, tiny))
        assert keys - apart == own - apart, one.name
        for name in ("trainer", "lora", "sampling"):
            asked, small = (of.document["stages"][one.name].get(name, {}).keys() for of in (whole, tiny))
            assert asked == small, one.name
