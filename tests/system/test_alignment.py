"""The recipe of four methods of alignment on a tiny model, on the real engines, and what the report says of it."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cordee import files, manifest
from cordee.artifact import Store

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]
QUICKSTART, ALIGNMENT = (f"configs/recipes/tiny/{name}.yaml" for name in ("quickstart", "alignment"))
METHODS = ["dpo", "kto", "qrpo", "grpo"]


ENVIRONMENT = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
KILLS = 3


def command(runs: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-c", "from cordee.cli import main; main()", *arguments, "--runs", str(runs)]


def call(runs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(runs, *arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the recipe's artifacts."""
    runs = tmp_path_factory.mktemp("alignment") / "runs"
    asked = [("stage", QUICKSTART, name) for name in ("corpus", "tokenizer", "tokens", "base")]
    for arguments in [*asked, ("run", ALIGNMENT)]:
        done = call(runs, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    return runs / "tiny-alignment"


def metrics(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "manifest.json").read_text())["metrics"]
    return found


@pytest.mark.timeout(1200)
def test_each_method_trains_from_the_same_model(published: Path) -> None:
    for name in METHODS:
        manifest = json.loads((published / f"{name}@1" / "manifest.json").read_text())
        assert "tiny-alignment/sft@1" in {read.get("artifact") for read in manifest["inputs"]}
        assert manifest["metrics"]["steps"] == 3
    for name, key in (("dpo", "rewards/margins"), ("kto", "kl"), ("qrpo", "loss"), ("grpo", "reward")):
        assert key in metrics(published / f"{name}@1")


def test_pairs_are_of_the_models_own_answers(published: Path) -> None:
    rows = [json.loads(line) for line in (published / "pairs@1" / "pairs.jsonl").read_text().splitlines()]
    scored = [json.loads(line) for line in (published / "scored@1" / "scored.jsonl").read_text().splitlines()]
    said = {row["messages"][-1]["content"] for row in scored}
    assert rows
    for row in rows:
        assert {row["chosen"][-1]["content"], row["rejected"][-1]["content"]} <= said
        assert row["chosen_reward"] > row["rejected_reward"]
        assert row["chosen_reward"] in row["reference_rewards"]
        assert row["chosen_reference_logprob"] < 0


def test_rewards_and_divergences_on_held_out_prompts_are_told_by_model(published: Path) -> None:
    told = json.loads((published / "judged@1" / "scores.json").read_text())
    assert told["models"].keys() == {"sft", *METHODS}
    assert told["compared_with"] == "sft"
    for name in METHODS:
        own = told["models"][name]
        assert {"mean", "error", "change", "change_error"} <= own["correct"].keys()
        assert "kl" not in own, "it is of answers that came to their end, and these models' never do"
    metrics = manifest.read(published / "judged@1").metrics
    assert metrics["other_tokens"] == metrics["rows"]


def test_adapters_were_measured_beside_their_base(published: Path) -> None:
    table = json.loads((published / "benchmarks@1" / "results.json").read_text())
    assert [row["name"] for row in table["models"]] == ["sft", *METHODS]


def killed(runs: Path, stage: str, after_s: float) -> bool:
    """Start a stage, and kill all of its processes after a time; whether it had not ended by itself."""
    process = subprocess.Popen(
        command(runs, "stage", ALIGNMENT, stage), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(after_s)
        return False
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    process.wait()
    return True


def content(folder: Path) -> dict[str, object]:
    """The hashes of an artifact's weights and rows, and the figures of its steps but for times."""
    found: dict[str, object] = {
        path.name: files.sha256(path) for pattern in ("*.safetensors", "scored.jsonl") for path in folder.glob(pattern)
    }
    if (folder / "metrics.jsonl").exists():
        rows = files.read_json_lines(folder / "metrics.jsonl")
        found["metrics"] = [{name: row[name] for name in row if not name.endswith("time")} for row in rows]
    return found


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", ["sft", *METHODS, "scored"])
def test_killed_at_random_moments_a_stage_ends_in_the_same_bits(published: Path, tmp_path: Path, stage: str) -> None:
    whole = published / f"{stage}@1"
    seconds = json.loads((whole / "manifest.json").read_text())["seconds"]
    runs, drawn, before_end = tmp_path / "runs", random.Random(stage), 0  # noqa: S311 - moments of a test
    shutil.copytree(published.parent, runs, symlinks=True)
    shutil.rmtree(runs / published.name / whole.name)
    shutil.rmtree(Store(runs).cache, ignore_errors=True)  # the reference's pass is killed too
    for _ in range(KILLS):
        before_end += killed(runs, stage, drawn.uniform(0.2, 1.0) * seconds)
    done = call(runs, "stage", ALIGNMENT, stage)
    assert done.returncode == 0, done.stdout + done.stderr
    (again,) = (runs / published.name).glob(f"{stage}@*")
    assert before_end
    assert content(again) == content(whole)
