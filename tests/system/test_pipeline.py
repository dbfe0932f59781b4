"""The whole pipeline on the real engines: accelerate with two processes, TRL, PEFT, vLLM and lm-eval."""

import html
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import damages
import pytest

from cordee import plan, recipe
from cordee.artifact import Store

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "configs/recipes/tiny/quickstart.yaml"
STAGES = ["corpus", "tokenizer", "tokens", "base", "chats", "sft", "dpo", "merged", "samples", "benchmarks", "report"]


SECRETS = {
    "HF_TOKEN": f"hf_{'Pl4nted' * 5}",
    "WANDB_API_KEY": "pl4nted0123456789abcdef",
    "OPENAI_API_KEY": f"sk-{'pl4nted' * 5}",
    "AWS_SECRET_ACCESS_KEY": "pl4nted+and+never+shown",
}
"""Planted in the environment of every command."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pipeline") / "runs"


def guarded(runs: Path) -> dict[str, str]:
    """An environment in which every Python refuses, and notes, a connection to another machine."""
    path = os.pathsep.join([str(Path(__file__).parent / "guard"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **SECRETS, "PYTHONPATH": path, "NETWORK_LOG": str(runs.parent / "network.log")}


def call(runs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from cordee.cli import main; main()", *arguments, "--runs", str(runs)]
    environment = {**guarded(runs), "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def published(runs) -> Path:
    """The folder of the tiny recipe's artifacts, after one run of the whole pipeline."""
    done = call(runs, "run", RECIPE)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "tiny"


@pytest.mark.timeout(1200)
def test_the_pipeline_publishes_every_stage(published):
    for name in STAGES:
        assert (published / f"{name}@1" / "manifest.json").exists()
    assert call(published.parent, "verify").returncode == 0


def test_no_secret_of_the_environment_is_in_any_file(published):
    paths = [path for path in published.parent.parent.rglob("*") if path.is_file()]
    assert len(paths) > 100
    found = [(name, path) for path in paths for name, secret in SECRETS.items() if secret.encode() in path.read_bytes()]
    assert found == []


def test_every_damage_to_real_artifacts_is_noticed(published, monkeypatch):
    monkeypatch.chdir(ROOT)
    store = Store(published.parent)
    found = list(damages.check(store, lambda: plan.make(recipe.load(Path(RECIPE)), store), 200, 20261125))
    assert [(what, problem) for what, problem in found if problem] == []
    assert len(found) == 200


def test_two_processes_trained(published):
    """As the processes themselves counted, not as they were asked for."""
    for name in ("base", "sft", "dpo"):
        manifest = json.loads((published / f"{name}@1" / "manifest.json").read_text())
        assert manifest["metrics"]["num_processes"] == 2


def test_every_checkpoint_was_measured_by_lm_eval_in_vllm(published):
    table = json.loads((published / "benchmarks@1" / "results.json").read_text())
    assert table["engine"]["name"] == "vllm"
    assert [row["name"] for row in table["models"]] == ["base-6", "base", "sft", "dpo"]
    for row in table["models"]:
        values = {one["task"]: one["value"] for one in row["results"]}
        assert set(values) == {"language_choice", "language_answer", "heldout_bits_per_byte"}
        (own,) = [
            json.loads(path.read_text())
            for path in (published / "benchmarks@1" / "lm_eval" / row["name"]).glob("*/results_*.json")
            if "language_choice" in json.loads(path.read_text())["results"]
        ]
        assert own["results"]["language_choice"]["acc,none"] == values["language_choice"]


def test_the_last_checkpoint_of_training_is_the_model_that_was_published(published):
    manifest = json.loads((published / "base@1" / "manifest.json").read_text())
    assert {"model.safetensors", "checkpoints/6/model.safetensors"} <= {item["path"] for item in manifest["files"]}
    assert not any(item["path"].startswith("resume/") for item in manifest["files"])


def test_a_second_run_does_nothing_again_in_less_than_five_seconds(published):
    started = time.monotonic()
    done = call(published.parent, "run", RECIPE)
    assert (done.returncode, "published" in done.stdout) == (0, False)
    assert time.monotonic() - started < 5


def test_a_changed_key_is_named_and_only_what_follows_is_made_again(published):
    override = "sft.trainer.learning_rate=5e-4"
    planned = call(published.parent, "plan", RECIPE, override)
    assert "sft is stale: trainer.learning_rate 0.001 → 0.0005" in planned.stdout
    states = {line.split()[1]: line.split()[5] for line in planned.stdout.splitlines() if line.startswith("│")}
    assert {name for name, state in states.items() if state == "stale"} == {
        "sft", "dpo", "merged", "samples", "benchmarks", "report",
    }  # fmt: skip
    done = call(published.parent, "stage", RECIPE, "sft", override)
    assert done.returncode == 0, done.stderr
    assert (published / "sft@1").exists()
    assert (published / "sft@2").exists()
    assert not (published / "base@2").exists()


def test_lineage_leads_back_to_the_corpus_and_its_licence(published):
    told = call(published.parent, "lineage", "tiny/merged@1").stdout
    assert "data/udhr.parquet" in told
    assert "licence: Universal Declaration of Human Rights" in told


@pytest.mark.timeout(1200)
def test_what_is_claimed_is_proven_and_stands_in_the_report(published):
    done = call(published.parent, "prove", RECIPE)
    assert done.returncode == 0, done.stdout + done.stderr
    page = html.unescape((published / "report@2" / "index.html").read_text())
    for name, stage in (("resume", "base"), ("masks", "sft"), ("parity", "merged")):
        certificate = json.loads((published / f"prove-{name}-{stage}@1" / "certificate.json").read_text())
        assert all(check["passed"] for check in certificate["checks"])
        assert certificate["claim"] in page
    again = call(published.parent, "prove", RECIPE)
    assert (again.returncode, "published" in again.stdout) == (0, False)


def test_no_step_reached_for_a_network(published):
    assert not (published.parent.parent / "network.log").exists()


REACHES = ["socket.create_connection(('192.0.2.1', 80))", "urllib.request.urlopen('http://example.org')"]
STRANGER = """
import socket, urllib.request
from cordee import worker
from cordee.config import Config as Plain, AccelerateConfig

class Config({base}):
    pass

def run(config, context):
    {reach}

def main():
    worker.main(Config, run)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("base", ["Plain", "AccelerateConfig"])
def test_a_step_that_reached_for_a_network_would_be_seen(tmp_path, monkeypatch, base, reach):
    """Started as every stage is: by itself, or by `accelerate launch`."""
    (tmp_path / "strangers").mkdir()
    (tmp_path / "strangers" / "far.py").write_text(STRANGER.format(base=base, reach=reach))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: far\nseed: 1\nstages: {away: {uses: strangers.far}}\n")
    done = call(tmp_path / "runs", "run", str(recipe))
    assert (done.returncode, "no network in this test" in done.stdout + done.stderr) == (1, True)
    assert (tmp_path / "network.log").read_text()
