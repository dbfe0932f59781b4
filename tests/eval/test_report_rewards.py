"""The report shows what rewards, pairs and reward models are like, as their artifacts tell it."""

import json
from pathlib import Path
from typing import Any

import fake_store
import pytest

from cordee.errors import Fault
from cordee.stage import Context
from eval import report

HOSTILE = "<script>alert(1)</script>&"
SCORES: dict[str, Any] = {
    "rewards": {
        "correct": {"answers": 40, "null_share": 0.0, "mean": 0.4, "std": 0.49, "least": 0.0, "most": 1.0,
                    "histogram": [24, *[0] * 18, 16]},
        HOSTILE: {"answers": 30, "null_share": 0.25, "mean": 5.5, "std": 1.5, "least": 1.5, "most": 8.5,
                  "histogram": [2] * 20, "mass": 0.13, "disagreement": 0.75},
        "never": {"answers": 0, "null_share": 1.0},
    },
    "by": {"language": {"de": {"correct": {"mean": 0.6, "answers": 20}}}},
    "answers": 40, "prompts": 10,
}  # fmt: skip
PAIRS = {"choose": "right_wrong", "pairs": 8, "prompts": 10, "answers": 40, "margin_mean": 1.0,
         "without": {"prompts without a wrong answer": 2}}  # fmt: skip
CALIBRATION = {"pairs": 50, "accuracy": 0.72, "expected_calibration_error": 0.05,
               "bins": [{"pairs": 50, "confidence": 0.77, "accuracy": 0.72}]}  # fmt: skip
SAMPLE = {"prompt": "1 + 1?", "reference": "2", "outputs": {"best": "2", "worst": "3"},
          "rewards": {"best": 1.0, "worst": 0.125}}  # fmt: skip


def made(tmp_path: Path, **changes: Any) -> Path:
    store = fake_store.FakeStore(tmp_path / "runs")
    shown = [
        store.publish("scored", "posttrain.score", {"scores.json": {**SCORES, **changes}, "scored.jsonl": [],
                                                    "samples.jsonl": [SAMPLE]}, metrics={"rows": 40}),
        store.publish("pairs", "posttrain.pairs", {"pairs.json": PAIRS, "pairs.jsonl": []}, metrics={"rows": 8}),
        store.publish("rm", "posttrain.reward", {
            "calibration.json": CALIBRATION, "config.json": {"architectures": ["LlamaForSequenceClassification"]},
        }),
    ]  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    config = report.Config.model_validate({"artifacts": [str(path) for path in shown]})
    report.run(config, Context(out=out, seed=0, events=tmp_path / "events.jsonl"))
    return out


def test_rewards_pairs_and_reward_models_are_shown(tmp_path: Path) -> None:
    out = made(tmp_path)
    page, told = (out / "index.html").read_text(encoding="utf-8"), json.loads((out / "report.json").read_text())
    assert 'id="rewards"' in page
    assert "40 answers to 10 prompts" in page
    assert "<script>" not in page
    assert page.count('class="chart histogram"') == 2, "none where there is nothing to show"
    assert "13.0% of the judge's probability; other verdict in the other order: 75.0%" in page
    assert "2 prompts without a wrong answer" in page
    assert "<b>72.0%</b> of 50 held-out pairs" in page
    assert "worst, reward 0.125" in page
    outputs = {item["stage"]: item["output"] for item in told["pipeline"]}
    assert outputs == {"scored": "40 scored answers", "pairs": "8 preference pairs", "rm": "a reward model"}
    assert told["rewards"]["pairs"][0]["choose"] == "right_wrong"
    assert told["samples"][0]["shown"][0]["outputs"][0]["reward"] == 1.0


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_the_model_compared_with_comes_first_and_a_sum_of_one_reward_is_not_told_twice(
    tmp_path: Path, weight: float
) -> None:
    rewards = {"correct": SCORES["rewards"]["correct"], "sum": SCORES["rewards"]["correct"]}
    models = {name: {"correct": {"mean": 0.5}, "sum": {"mean": 0.5 * weight}} for name in ("dpo", "sft")}
    out = made(tmp_path, rewards=rewards, models=models, weights={"correct": weight}, compared_with="sft", by={})
    page = (out / "index.html").read_text(encoding="utf-8")
    assert ("weighted sum" in page) == ('<th scope="row">sum' in page) == (weight != 1.0)
    assert page.index('<th scope="row">sft</th>') < page.index('<th scope="row">dpo</th>')


def test_a_report_without_rewards_has_no_such_section(report: Any) -> None:
    assert 'id="rewards"' not in (report() / "index.html").read_text(encoding="utf-8")


def test_figures_that_are_none_are_a_fault(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"scores\.json: answers"):
        made(tmp_path, answers="many")
