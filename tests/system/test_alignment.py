"""The recipe of four methods of alignment on a tiny model, on the real engines, and what the report says of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]
QUICKSTART, ALIGNMENT = (f"configs/recipes/tiny/{name}.yaml" for name in ("quickstart", "alignment"))
METHODS = ["dpo", "kto", "qrpo", "grpo"]


def call(runs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from cordee.cli import main; main()", *arguments, "--runs", str(runs)]
    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


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
        assert abs(own["kl"]["mean"]) < 5
    page = (published / "report@1" / "index.html").read_text()
    assert "divergence of the model's answers from the reference" in page


def test_adapters_were_measured_beside_their_base(published: Path) -> None:
    table = json.loads((published / "benchmarks@1" / "results.json").read_text())
    assert [row["name"] for row in table["models"]] == ["sft", *METHODS]
