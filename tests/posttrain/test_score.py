"""Answers are scored in parts that are never done twice, and their log-probabilities are those of the reference."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from reward_samples import answer, expected, notes, rows_in, score_config, some_answers, written
from stopping import StopsAfter

from cordee.cost import Cost
from cordee.errors import Stopped, UserError
from cordee.stage import Context
from posttrain import score

NewContext = Callable[[str], Context]


def test_rows_have_their_rewards_by_name_and_those_of_the_prompt(tmp_path: Path, context: Context) -> None:
    rewards = [
        {"name": "correct", "function": "number_match"},
        {"name": "short", "function": "length_between", "most": 3, "unit": "words", "weight": 0.5},
    ]
    data = some_answers(tmp_path / "a.jsonl", language="de", kind="sum")
    metrics = score.run(score_config(data, rewards=rewards), context)
    rows = rows_in(context.out / "scored.jsonl")
    assert len(rows) == metrics["rows"] == 24
    assert metrics["prompts"] == 6
    for row in rows:
        right = float(row["sample"] < row["prompt_id"] % 5)
        assert row["rewards"] == {"correct": right, "short": 1.0}
        assert row["reward"] == right + 0.5
        count = row["prompt_id"] % 5
        assert row["reference_rewards"] == [0.5] * (4 - count) + [1.5] * count
        assert row["answer"] == str(7 * row["prompt_id"])
    told = json.loads((context.out / "scores.json").read_text())
    mean = sum(number % 5 for number in range(6)) / 24
    assert told["rewards"]["correct"]["mean"] == pytest.approx(mean)
    assert told["rewards"]["correct"]["std"] == pytest.approx((mean * (1 - mean)) ** 0.5)
    assert told["rewards"]["sum"]["histogram"][0] == 24 - sum(number % 5 for number in range(6))
    assert told["by"]["language"]["de"]["correct"]["answers"] == 24
    assert metrics["correct_mean"] == pytest.approx(mean)
    samples = rows_in(context.out / "samples.jsonl")
    assert all(row["rewards"]["best"] >= row["rewards"]["worst"] for row in samples)
    assert sorted(path.name for path in context.out.iterdir()) == ["samples.jsonl", "scored.jsonl", "scores.json"]


def test_the_rewards_of_the_reference_are_those_of_its_own_rows(tmp_path: Path, context: Context) -> None:
    rows = [answer(1, "It is 7.", "7", model="ref"), answer(1, "9", "7", model="ref"), answer(1, "7", "7", model="big")]
    rows.insert(1, answer(2, "14", "14", model="big"))
    score.run(score_config(written(tmp_path / "a.jsonl", rows), reference_answers="ref"), context)
    found = rows_in(context.out / "scored.jsonl")
    assert [row["reference_rewards"] for row in found] == [[0.0, 1.0]] * 3 + [[]]
    assert "1 prompts have no answer with a reward by 'ref'" in notes(context)


def test_answers_of_several_files_to_a_prompt_are_put_together(tmp_path: Path, context: Context) -> None:
    for name in ("a", "b"):
        some_answers(tmp_path / "answers" / f"{name}.jsonl")
    score.run(score_config(tmp_path / "answers", batch_size=100), context)
    rows = rows_in(context.out / "scored.jsonl")
    assert [row["prompt_id"] for row in rows] == [number for number in range(6) for _ in range(8)]
    assert all(len(row["reference_rewards"]) == 8 for row in rows)


def test_of_several_models_without_a_reference_no_rewards_are_the_references(
    model_folder: Path, tmp_path: Path, new_context: NewContext
) -> None:
    """QRPO's quantiles would be among the answers of all of them; pairs need none. A partition knows all models."""
    from preference_samples import keys_of

    from posttrain import qrpo

    context = new_context("scored")
    rows = [answer(n, f"{7 * n - s}", str(7 * n), model="ab"[n % 2], reference_rewards=[9.0])
            for n in range(4) for s in (0, 1)]  # fmt: skip
    score.run(score_config(written(tmp_path / "a.jsonl", rows), partition=[1, 2]), context)
    found = rows_in(context.out / "scored.jsonl")
    assert {row["model"] for row in found} == {"a"}
    assert not any("reference_rewards" in row for row in found)
    assert any("the rows are of 2 models (a, b): no `reference_rewards`" in note for note in notes(context))
    keys = keys_of("qrpo", model_folder, context.out / "scored.jsonl")
    with pytest.raises(UserError, match=r"has no rewards of the reference model's own answers.*`reference_answers`"):
        qrpo.run(qrpo.Config.model_validate(keys), new_context("qrpo"))


def test_partitions_are_all_prompts_each_once(tmp_path: Path, new_context: NewContext) -> None:
    data, whole = some_answers(tmp_path / "a.jsonl"), new_context("whole")
    score.run(score_config(data), whole)
    found = []
    for which in (1, 2):
        part = new_context(f"part{which}")
        score.run(score_config(data, partition=[which, 2]), part)
        found += rows_in(part.out / "scored.jsonl")
    key = lambda row: (row["prompt_id"], row["sample"])  # noqa: E731
    assert sorted(found, key=key) == rows_in(whole.out / "scored.jsonl")


def test_what_is_done_is_not_done_again_after_a_stop(tmp_path: Path, new_context: NewContext) -> None:
    calls = tmp_path / "calls.txt"
    module = tmp_path / "own_rewards.py"
    module.write_text(
        "def counted(prompts, completions, sample, **_):\n"
        f"    open({str(calls)!r}, 'a').writelines(f'{{prompt[-1][\"content\"]}} {{n}}\\n' for prompt, n in "
        "zip(prompts, sample))\n"
        "    return [len(said[-1]['content']) for said in completions]\n"
    )
    data = some_answers(tmp_path / "a.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        config = score_config(data, rewards=[{"function": "own_rewards:counted"}])
        whole, broken = new_context("whole"), new_context("broken")
        score.run(config, whole)
        calls.unlink()
        with pytest.raises(Stopped, match="counted: prompt 4 of 6"):
            score.run(config, StopsAfter(broken.out, broken.seed, broken.events, steps=4))
        score.run(config, broken)
    assert len(calls.read_text().splitlines()) == len(set(calls.read_text().splitlines())) == 24
    for path in whole.out.iterdir():
        assert path.read_bytes() == (broken.out / path.name).read_bytes()


@pytest.mark.parametrize("keys", [{"precision": "float32"}, {"max_length": 64}], ids=str)
def test_what_the_reference_alone_reads_needs_one(keys: dict[str, object]) -> None:
    given = {"data": [{"path": "a"}], "rewards": [{"function": "exact_match"}]}
    with pytest.raises(UserError, match=f"{next(iter(keys))}: is for a `reference`"):
        score.Config.model_validate(given | keys)
    config = score.Config.model_validate(given)
    assert score.Config.model_validate(config.model_dump(mode="json")) == config, "as job.json is read"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": []}, "rewards: missing: give `rewards` or `reference`"),
        ({"partition": [3, 2]}, "partition: part 3 of 2 does not exist"),
        ({"partition": [1, 9]}, "partition: 6 prompts can't be divided into 9 parts"),
        ({"rewards": [{"function": "exact_match"}, {"function": "exact_match"}]}, "two are called 'exact_match'"),
        ({"rewards": [{"function": "passes_tests"}]}, "needs the column 'tests', which the rows lack"),
        ({"rewards": [{"function": "format_match", "pattern": "("}]}, "rewards: format_match: .*missing \\)"),
        ({"rewards": [{"function": "mumber_match"}]}, "no reward 'mumber_match'; did you mean 'number_match'"),
        ({"rewards": [{"function": "nowhere:f"}]}, "there is no module 'nowhere'"),
        ({"rewards": [{"function": "trl.rewards:accuracy"}]}, "trl.rewards has no function 'accuracy'"),
        ({"rewards": [{"function": "exact_match", "compare": True}]}, "compare: exact_match has no such argument"),
    ],
)
def test_what_can_not_be_scored_is_one_line(tmp_path: Path, context: Context, changes: dict, message: str) -> None:
    from cordee import recipe

    data = some_answers(tmp_path / "a.jsonl")
    keys = {**score_config(data).model_dump(mode="json"), **changes}
    with pytest.raises(UserError, match=message):
        score.run(recipe.validate(score.Config, keys, "r.yaml", "stages.score"), context)


def test_rows_without_an_answer_are_counted_and_may_be_dropped(tmp_path: Path, new_context: NewContext) -> None:
    rows = [answer(1, "7", "7"), {"messages": [{"role": "user", "content": "?"}]}, {"prompt": "only"}]
    data = written(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match="2 of 3 rows"):
        score.run(score_config(data), new_context("strict"))
    context = new_context("lenient")
    assert score.run(score_config(data, bad_rows="drop"), context)["rows"] == 1
    assert json.loads((context.out / "scores.json").read_text())["left_out"][0]["rows"] == 1


def test_the_reference_log_probability_is_that_of_the_answer_with_its_end(
    model_folder: Path, tmp_path: Path, context: Context
) -> None:
    data = some_answers(tmp_path / "a.jsonl", prompts=3)
    odd = [answer(0, " ", "0", sample=9), answer(1, "It is 7.", "7", sample=8, tokens=99)]
    empty = written(tmp_path / "empty.jsonl", odd)
    config = score_config(data, reference=str(model_folder), data=[{"path": str(data)}, {"path": str(empty)}])
    metrics = score.run(config, context)
    rows = rows_in(context.out / "scored.jsonl")
    for row in rows:
        if row["sample"] == 9:
            assert row["reference_logprob"] is row["reference_tokens"] is None
            continue
        logprob, tokens = expected(model_folder, row)
        assert row["reference_logprob"] == pytest.approx(logprob, rel=1e-5)
        assert row["reference_tokens"] == tokens
    assert metrics["tokens"] == sum(row["reference_tokens"] or 0 for row in rows)
    assert metrics["empty"] == 1
    assert "1 answers say nothing: they have no reference log-probability" in notes(context)
    assert metrics["other_tokens"] == 1
    assert any(one.startswith("1 answers were cut off, or their text has other tokens") for one in notes(context))


def test_it_is_that_of_preference_training(model_folder: Path, tmp_path: Path, context: Context) -> None:
    """The same tokens as `posttrain.dpo` compares: the whole rendering behind the prompt."""
    from dpo_samples import pair

    from cordee.chat import completions, pairs
    from cordee.chat.conversations import Encoder
    from cordee.chat.problems import Notes, Problems
    from cordee.chat.schema import Record
    from cordee.chat.source import Limits, Rules, Source
    from cordee.compute.tokenizer import open_tokenizer
    from cordee.config import Input
    from cordee.data.row import Row

    del context
    tokenizer = open_tokenizer(model_folder)
    encoder = Encoder.of(tokenizer, Source(path=Input(tmp_path)), Rules(Limits(None, 512, len(tokenizer))))
    for number in range(6):
        row = pair(number)
        problems = Problems()
        (found,) = pairs.encode([Row(tmp_path, 1, row)], encoder, problems, Notes())
        chat = {"messages": [*row["prompt"], *row["chosen"]]}
        one = completions.of_chat(Record(tmp_path, 1, chat), encoder.required_template())
        assert one == (found.prompt, found.chosen)


def test_a_prompt_too_long_for_the_reference_is_named(model_folder: Path, tmp_path: Path, context: Context) -> None:
    data = some_answers(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="longer than max_length=8 tokens"):
        score.run(score_config(data, reference=str(model_folder), max_length=8), context)


def test_a_base_model_reads_answers_as_texts(model_folder: Path, tmp_path: Path, context: Context) -> None:
    import shutil

    bare = shutil.copytree(model_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template.jinja"))
    data = written(tmp_path / "a.jsonl", [{"prompt": "Alle Menschen", "completion": " sind frei", "answer": "x"}])
    score.run(score_config(data, reference=str(bare), rewards=[]), context)
    (row,) = rows_in(context.out / "scored.jsonl")
    assert row["reference_logprob"] < 0
    assert row["reference_tokens"] >= 2


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
import slow_rewards
from cordee.stage import Context
from posttrain import score
from reward_samples import score_config
config = score_config(Path({data!r}), rewards=[{{"function": "slow_rewards:slow"}}], batch_size=1)
score.run(config, Context(out=Path({out!r}), seed=3, events=Path({events!r})))
"""


@pytest.mark.long
def test_killed_at_any_moment_nothing_but_the_part_in_work_is_done_again(
    tmp_path: Path, new_context: NewContext
) -> None:
    calls = tmp_path / "calls.txt"
    (tmp_path / "slow_rewards.py").write_text(
        "import time\ndef slow(completions, prompt_id, **_):\n    time.sleep(0.05)\n"
        f"    open({str(calls)!r}, 'a').write(f'{{prompt_id[0]}}\\n')\n    return [1.0 + n for n in prompt_id]\n"
    )
    data, context = some_answers(tmp_path / "a.jsonl", prompts=30), new_context("killed")
    script = KILLED.format(
        paths=[str(tmp_path), str(Path(__file__).parent)], data=str(data), out=str(context.out),
        events=str(context.events),
    )  # fmt: skip
    drawn = random.Random(5)  # noqa: S311 - no secret
    kills = 0
    for _ in range(12):
        with subprocess.Popen([sys.executable, "-c", script]) as process:
            known = len(calls.read_text().splitlines()) if calls.exists() else 0
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                done = len(calls.read_text().splitlines()) if calls.exists() else 0
                if kills < 3 and done >= known + 4:
                    time.sleep(drawn.random() * 0.1)
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.01)
        if (context.out / "scores.json").exists():
            break
    asked = calls.read_text().splitlines()
    assert kills == 3
    assert sorted({*map(int, asked)}) == list(range(30))
    assert len(asked) <= 30 + kills
    assert [row["reward"] for row in rows_in(context.out / "scored.jsonl")] == [
        1.0 + number for number in range(30) for _ in range(4)
    ]


def test_the_cost_is_one_pass_of_the_reference(model_folder: Path, tmp_path: Path) -> None:
    data = some_answers(tmp_path / "a.jsonl")
    own = score.cost(score_config(data, reference=str(model_folder), partition=[1, 2]), {})
    assert own.rows == 12
    assert own.flops == pytest.approx(2 * own.parameters * own.tokens)
    given = {"data.0.path": Cost(rows=8)}
    assert score.cost(score_config(tmp_path / "not-made"), given).rows == 8
