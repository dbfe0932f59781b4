"""Figures of answers by the model that gave them: means, errors over prompts, changes, and the divergence."""

import json
import math
import shutil
from pathlib import Path

import pytest
from reward_samples import answer, rows_in, score_config, written
from safetensors.torch import load_file, save_file

from cordee import files
from cordee.errors import UserError
from cordee.stage import Context
from posttrain import score
from posttrain.rewards.by_model import ByModel


def row(model: str, reward: float | None, own: float | None = None) -> dict[str, object]:
    return {"model": model, "rewards": {"right": reward}, "reward": reward, "policy_logprob": own,
            "reference_logprob": -3.0}  # fmt: skip


def test_means_errors_and_changes_are_over_prompts() -> None:
    figures = ByModel("before")
    figures.add(0, [row("before", 0.0), row("before", 1.0), row("after", 1.0, -2.0)])
    figures.add(1, [row("before", 0.0), row("before", None), row("after", 1.0, -2.5)])
    figures.add(2, [row("after", 0.0, -3.0)])
    told = figures.described()
    assert told["before"]["right"]["mean"] == 0.25  # of 0.5 and 0
    assert told["before"]["right"]["error"] == pytest.approx(0.25)
    assert told["after"]["right"]["mean"] == pytest.approx(2 / 3)
    assert told["after"]["right"]["change"] == 0.75  # of 0.5 and 1, the prompts that both have answered
    assert told["after"]["right"]["change_error"] == pytest.approx(0.25)
    assert told["after"]["kl"]["mean"] == pytest.approx(0.5)
    assert told["after"]["kl"]["error"] == pytest.approx(0.5 / math.sqrt(3))
    assert "change" not in told["before"]["right"]
    assert told["before"].keys() == {"right", "sum"}


def test_a_divergence_is_of_what_was_sampled() -> None:
    figures = ByModel(None)
    as_sampled = row("after", 1.0, -2.0) | {"finish_reason": "stop", "tokens": 4, "reference_tokens": 4}
    cut_off = row("after", 1.0, -9.0) | {"finish_reason": "length", "tokens": 4, "reference_tokens": 4}
    other_tokens = row("after", 1.0, -9.0) | {"finish_reason": "stop", "tokens": 4, "reference_tokens": 3}
    figures.add(0, [as_sampled, cut_off, other_tokens])
    assert figures.described()["after"]["kl"]["mean"] == pytest.approx(1.0)
    assert figures.described()["after"]["right"]["prompts"] == 1


def changed(model: Path, folder: Path) -> Path:
    """A copy of a model with other norms."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name: value * 1.5 if "norm" in name else value for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_each_policy_reads_its_own_answers(model_folder: Path, tmp_path: Path, context: Context) -> None:
    """The divergence is the difference of two passes, each with one model over the same answers."""
    other = changed(model_folder, tmp_path / "other")
    answers = [answer(number, "Ja", "Ja", model=model) for number in range(3) for model in ("first", "second")]
    data = written(tmp_path / "a.jsonl", answers)
    keys = {"reference": str(model_folder), "reference_answers": "first"}
    score.run(score_config(data, policies={"second": str(other)}, **keys), context)
    rows = rows_in(context.out / "scored.jsonl")
    alone = Context(out=tmp_path / "alone", seed=3, events=tmp_path / "events.jsonl")
    alone.out.mkdir()
    score.run(score_config(data, reference=str(other)), alone)
    expected = [one["reference_logprob"] for one in rows_in(alone.out / "scored.jsonl")]
    assert ["policy_logprob" in one and one["policy_logprob"] is not None for one in rows] == [False, True] * 3
    assert [one["policy_logprob"] for one in rows[1::2]] == pytest.approx(expected[1::2])
    told = files.read_json(context.out / "scores.json")
    differences = [one["policy_logprob"] - one["reference_logprob"] for one in rows[1::2]]
    assert told["models"]["second"]["kl"]["mean"] == pytest.approx(sum(differences) / 3)
    assert told["compared_with"] == "first"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"policies": {"nobody": "{model}"}, "reference": "{model}"}, "policies.nobody: no answer has the `model`"),
        ({"policies": {"first": "{model}"}}, "policies: there is nothing to compare them with"),
    ],
    ids=["unknown", "no reference"],
)
def test_a_policy_without_answers_or_reference_is_named(
    keys: dict[str, object], problem: str, model_folder: Path, tmp_path: Path, context: Context
) -> None:
    data = written(tmp_path / "a.jsonl", [answer(0, "Ja", "Ja", model="first")])
    filled = json.loads(json.dumps(keys).replace("{model}", str(model_folder)))
    with pytest.raises(UserError) as raised:
        score.run(score_config(data, **filled), context)
    assert problem in str(raised.value)
