"""Figures of answers by the model that gave them: means, errors over prompts, changes, and the divergence."""

import json
import math
import shutil
from pathlib import Path

import pytest
from reward_samples import answer, expected, rows_in, score_config, written
from safetensors.torch import load_file, save_file

from cordee import files
from cordee.errors import UserError
from cordee.stage import Context
from posttrain import score
from posttrain.rewards.by_model import ByModel


def row(model: str, reward: float | None, log_ratio: float | None = None) -> dict[str, object]:
    return {"model": model, "rewards": {"right": reward}, "reward": reward, "log_ratio": log_ratio}


def test_means_errors_and_changes_are_over_prompts() -> None:
    figures = ByModel("before")
    figures.add(0, [row("before", 0.0), row("before", 1.0), row("after", 1.0, 1.0)])
    figures.add(1, [row("before", 0.0), row("before", None), row("after", 1.0, 0.5)])
    figures.add(2, [row("after", 0.0, 0.0)])
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
    "tail", ["", "{{ '\\n' }}"], ids=["nothing behind the end of turn", "a line end behind it, as ChatML's"]
)
def test_a_divergence_is_of_what_was_sampled(tail: str, model_folder: Path, tmp_path: Path, context: Context) -> None:
    """Not of answers that were cut off or have other tokens, and not of what the template writes behind an answer."""
    reference, policy = tmp_path / "reference", changed(model_folder, tmp_path / "policy")
    shutil.copytree(model_folder, reference)
    for folder in (reference, policy):
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").write_text(
            template + f"{{% if not add_generation_prompt %}}{tail}{{% endif %}}"
        )
    plain = [answer(number, "Ja", "Ja", model="after") for number in range(4)]
    ended = expected(model_folder, plain[0])[1]
    how = [{"finish_reason": "stop", "tokens": ended}, {"finish_reason": "length", "tokens": ended},
           {"finish_reason": "stop", "tokens": ended + 3}, {}]  # fmt: skip
    data = written(tmp_path / "a.jsonl", [one | more for one, more in zip(plain, how, strict=True)])
    keys = {"reference": str(reference), "policies": {"after": str(policy)}, "reference_answers": "before"}
    score.run(score_config(data, **keys), context)
    rows = rows_in(context.out / "scored.jsonl")
    assert [one["reference_tokens"] for one in rows] == [ended + bool(tail)] * 4
    assert [one["as_sampled"] for one in rows] == [True, False, False, True]
    sampled = [expected(policy, one, ended)[0] - expected(reference, one, ended)[0] for one in rows[::3]]
    assert [one["log_ratio"] for one in rows[::3]] == pytest.approx(sampled, rel=1e-4)
    assert rows[1]["log_ratio"] is rows[2]["log_ratio"] is None
    told = files.read_json(context.out / "scores.json")["models"]["after"]
    assert told["kl"]["mean"] == pytest.approx(sum(sampled) / 2, rel=1e-4)
    assert told["kl"]["prompts"] == 2


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
