"""Pairs are the ones that were asked for, by hand; what makes no pair is counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reward_samples import answer, notes, pairs_config, rows_in, score_config, some_answers, written

from cordee.errors import UserError
from cordee.stage import Context
from posttrain import pairs, score

NewContext = Callable[[str], Context]


def scored(path: Path, rewards: list[list[float | None]]) -> Path:
    """Of each prompt an answer with each of these rewards, which it says."""
    rows: list[dict[str, Any]] = [
        answer(number, f"{value}", "x", reward=value, rewards={"only": value}, reference_logprob=-1.5 - at,
               reference_tokens=2 + at, policy_logprob=-2.0, reference_rewards=[0.0, 1.0], language="de")
        for number, own in enumerate(rewards) for at, value in enumerate(own)
    ]  # fmt: skip
    return written(path, rows)


def made(context: Context) -> list[tuple[float, float]]:
    return [(row["chosen_reward"], row["rejected_reward"]) for row in rows_in(context.out / "pairs.jsonl")]


def test_a_pair_has_its_prompt_its_sides_and_what_is_known_of_them(tmp_path: Path, context: Context) -> None:
    metrics = pairs.run(pairs_config(scored(tmp_path / "s.jsonl", [[0.2, 0.9, 0.5], [1.0, 1.0]])), context)
    (row,) = rows_in(context.out / "pairs.jsonl")
    assert row == {
        "prompt": [{"role": "user", "content": "What is 0 times 7?"}],
        "chosen": [{"role": "assistant", "content": "0.9"}],
        "rejected": [{"role": "assistant", "content": "0.2"}],
        "chosen_reward": 0.9, "rejected_reward": 0.2,
        "chosen_reference_logprob": -2.5, "rejected_reference_logprob": -1.5,
        "chosen_reference_tokens": 3, "rejected_reference_tokens": 2,
        "reference_rewards": [0.0, 1.0], "answer": "x", "prompt_id": 0, "language": "de",
    }  # fmt: skip
    assert metrics == {"rows": 1, "prompts": 2, "answers": 5, "margin_mean": pytest.approx(0.7)}
    told = json.loads((context.out / "pairs.json").read_text())
    assert told["without"]["prompts whose answers all have the same reward"] == 1
    assert any("1 pairs of 2 prompts" in note for note in notes(context))
    assert sorted(path.name for path in context.out.iterdir()) == ["pairs.json", "pairs.jsonl", "samples.jsonl"]


@pytest.mark.parametrize(
    ("keys", "rewards", "expected"),
    [
        ({}, [0.1, 0.4, 0.3, 0.9], {(0.9, 0.1)}),
        ({"max_pairs_per_prompt": 3}, [0.1, 0.4, 0.3, 0.9], {(0.9, 0.1), (0.4, 0.3)}),
        ({"max_pairs_per_prompt": 3, "min_margin": 0.2}, [0.1, 0.4, 0.3, 0.9], {(0.9, 0.1)}),
        ({"choose": "best_worst_quantile", "quantile": 0.2}, [n / 10 for n in range(10)],
         {(0.9, 0.0), (0.9, 0.1)}),
        ({"choose": "threshold", "chosen_above": 0.8, "rejected_below": 0.2, "max_pairs_per_prompt": 9},
         [0.1, 0.2, 0.5, 0.9], {(0.9, 0.1), (0.9, 0.2)}),
        ({"choose": "right_wrong", "max_pairs_per_prompt": 9}, [1.0, 0.0, 1.0, -1.0, 0.0],
         {(1.0, 0.0), (1.0, -1.0)}),
    ],
)  # fmt: skip
def test_a_choice_makes_no_other_pairs_than_these(
    keys: dict[str, Any], rewards: list[float], expected: set[tuple[float, float]], tmp_path: Path, context: Context
) -> None:
    pairs.run(pairs_config(scored(tmp_path / "s.jsonl", [rewards] * 20), **keys), context)
    assert {*made(context)} == expected
    counts = [made(context).count(pair) for pair in expected]
    assert sum(counts) <= 20 * keys.get("max_pairs_per_prompt", 1)


def test_no_answer_is_on_one_side_twice_and_the_seed_decides(tmp_path: Path, new_context: NewContext) -> None:
    rows = [answer(1, f"right {n}", "x", reward=1.0, sample=n) for n in range(4)]
    rows += [answer(1, f"wrong {n}", "x", reward=0.0, sample=4 + n) for n in range(3)]
    data = written(tmp_path / "s.jsonl", rows)
    found = []
    for name in ("one", "two"):
        context = new_context(name)
        pairs.run(pairs_config(data, choose="right_wrong", max_pairs_per_prompt=9), context)
        found.append((context.out / "pairs.jsonl").read_text())
        told = rows_in(context.out / "pairs.jsonl")
        for side in ("chosen", "rejected"):
            assert len({row[side][0]["content"] for row in told}) == 3
    assert found[0] == found[1]
    other = new_context("other")
    pairs.run(pairs_config(data, choose="right_wrong", max_pairs_per_prompt=9), Context(other.out, 99, other.events))
    assert (other.out / "pairs.jsonl").read_text() != found[0]


def test_pairs_by_one_reward_have_no_rewards_of_the_reference(tmp_path: Path, context: Context) -> None:
    """These are sums, which its values can't be compared with."""
    pairs.run(pairs_config(scored(tmp_path / "s.jsonl", [[0.2, 0.9]]), reward="only"), context)
    (row,) = rows_in(context.out / "pairs.jsonl")
    assert (row["chosen_reward"], "reference_rewards" in row) == (0.9, False)


def test_what_makes_no_pair_is_counted(tmp_path: Path, context: Context) -> None:
    data = scored(tmp_path / "s.jsonl", [[1.0, 1.0], [0.0, 0.0], [1.0], [None, 1.0], [1.0, 0.0]])
    extra = written(tmp_path / "e.jsonl", [answer(9, "  ", "x", reward=1.0), answer(9, "no", "x", reward=0.0)])
    config = pairs_config(data, choose="right_wrong", data=[{"path": str(data)}, {"path": str(extra)}])
    pairs.run(config, context)
    without = json.loads((context.out / "pairs.json").read_text())["without"]
    assert {name: count for name, count in without.items() if count} == {
        "prompts whose answers all have the same reward": 2,
        "prompts with fewer than two answers": 3,
        "answers without a reward": 1,
        "answers that say nothing": 1,
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"choose": "best_wurst"}, "no choose 'best_wurst'; did you mean 'best_worst'"),
        ({"choose": "threshold"}, "chosen_above: is needed"),
        ({"chosen_above": 1.0}, "chosen_above: is for threshold, not for best_worst"),
        ({"choose": "threshold", "chosen_above": 0.1, "rejected_below": 0.1}, "chosen_above: has to be above"),
        ({"reward": "onyl"}, "reward: no pair of 2 prompts: .*did you mean 'only'"),
        ({"quantile": 0.3}, "quantile: is for best_worst_quantile, not for best_worst"),
        ({"min_margin": 5.0}, "data: no pair .*2 prompts without two different answers at least min_margin=5.0"),
    ],
)
def test_what_can_not_be_paired_is_one_line(
    keys: dict[str, Any], message: str, tmp_path: Path, context: Context
) -> None:
    data = scored(tmp_path / "s.jsonl", [[0.2, 0.9], [0.0, 1.0]])
    with pytest.raises(UserError, match=message):
        pairs.run(pairs_config(data, **keys), context)


def test_one_prompt_is_one_however_it_is_written(tmp_path: Path, context: Context) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    turned = [dict(reversed(turn.items())) for turn in turns]
    turned[1] |= {"train": False}
    rows = [
        {"messages": [*prompt, {"role": "assistant", "content": said}], "reward": reward}
        for prompt, said, reward in ((turns, "good", 1.0), (turned, "bad", 0.0))
    ]
    rows.append({"prompt": turns, "completion": [{"role": "assistant", "content": "middling"}], "reward": 0.5})
    metrics = pairs.run(pairs_config(written(tmp_path / "s.jsonl", rows)), context)
    assert (metrics["prompts"], metrics["answers"]) == (1, 3)
    assert made(context) == [(1.0, 0.0)]


def test_answers_that_call_a_tool_are_paired(tmp_path: Path, context: Context) -> None:
    def calling(name: str) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": name, "arguments": {}}}
        return [{"role": "user", "content": "now"}, {"role": "assistant", "content": "", "tool_calls": [call]}]

    rows = [{"messages": calling("time"), "reward": 1.0}, {"messages": calling("date"), "reward": 0.0}]
    pairs.run(pairs_config(written(tmp_path / "s.jsonl", rows)), context)
    (row,) = rows_in(context.out / "pairs.jsonl")
    named = [row[side][0]["tool_calls"][0]["function"]["name"] for side in ("chosen", "rejected")]
    assert named == ["time", "date"]


def test_a_reward_that_is_no_finite_number_names_its_row(tmp_path: Path, new_context: NewContext) -> None:
    file = scored(tmp_path / "s.jsonl", [[0.2, float("nan")]])
    with pytest.raises(UserError, match=r"s\.jsonl: row 2: reward is no number: nan; null, if it has none"):
        pairs.run(pairs_config(file), new_context("nan"))
    file.write_text(file.read_text().replace("NaN", '""'))  # as a table of texts has none
    with pytest.raises(UserError, match="no pair"):
        pairs.run(pairs_config(file), new_context("empty"))


def test_rows_that_were_not_scored_are_an_error(tmp_path: Path, context: Context) -> None:
    with pytest.raises(UserError, match="row 1: has no `reward`"):
        pairs.run(pairs_config(some_answers(tmp_path / "a.jsonl")), context)


def test_scored_answers_become_pairs_that_dpo_reads(
    model_folder: Path, tmp_path: Path, new_context: NewContext
) -> None:
    from posttrain import dpo

    first, second, third = (new_context(name) for name in ("scored", "pairs", "dpo"))
    score.run(score_config(some_answers(tmp_path / "a.jsonl", prompts=20), reference=str(model_folder)), first)
    pairs.run(pairs_config(first.out / "scored.jsonl", choose="right_wrong", reward="correct"), second)
    keys = {
        "model": str(model_folder), "data": [{"path": str(second.out / "pairs.jsonl")}], "global_batch_size": 4,
        "lora": {"r": 2}, "trainer": {"max_steps": 1, "max_length": 128},
    }  # fmt: skip
    metrics = dpo.run(dpo.Config.model_validate(keys), third)
    assert metrics["rows"] == len(rows_in(second.out / "pairs.jsonl")) > 4
