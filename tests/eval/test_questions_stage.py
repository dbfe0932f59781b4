"""The questions of benchmarks as rows, from lm-eval's own tasks, task files and files of one's own."""

import json
from pathlib import Path

import pytest

from cordee.errors import UserError
from cordee.files import read_json_lines
from cordee.stage import Context
from eval import questions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def context(tmp_path):
    (tmp_path / "out").mkdir()
    return Context(out=tmp_path / "out", seed=3, events=tmp_path / "events.jsonl")


def rows(context, **keys):
    metrics = questions.run(questions.Config.model_validate(keys), context)
    found = read_json_lines(context.out / questions.QUESTIONS)
    assert metrics["rows"] == len(found)
    return found


def test_lm_evals_own_task_asks_its_test_split(context, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = rows(context, tasks=["gsm8k"], data_dir="data")
    assert len(found) == 1319
    assert {row["task"] for row in found} == {"gsm8k"}
    assert found[0]["prompt"].startswith("Question: Janet")
    assert [row["document"] for row in found[:3]] == [0, 1, 2]


def test_questions_of_ones_own_and_a_limit(context, tmp_path):
    own = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    found = rows(context, questions=str(tmp_path / "sums.jsonl"), limit=3)
    assert [row["prompt"] for row in found] == [f"Question: What is {n} + {n}?\nAnswer:" for n in range(3)]
    assert {row["task"] for row in found} == {"sums"}


def test_choices_of_contexts_and_rolling_texts(context, tmp_path):
    """WinoGrande asks each of its contexts; perplexity asks the text."""
    documents = [{"text": "A long text to be scored.", "options": ["Anna slept because", "Beat slept because"]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "own"}}, "test_split": "test"}
    several = {
        **common, "task": "several", "output_type": "multiple_choice", "doc_to_text": 1, "doc_to_target": "{{text}}",
        "doc_to_choice": "options", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    rolling = {
        **common, "task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    for task in (several, rolling):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task))
    found = rows(
        context, tasks=[str(tmp_path / "several.yaml"), str(tmp_path / "rolling.yaml")],
        data={"own": str(tmp_path / "data.jsonl")},
    )  # fmt: skip
    assert [(row["task"], row["prompt"]) for row in found] == [
        ("several", "Anna slept because"), ("several", "Beat slept because"), ("rolling", "A long text to be scored."),
    ]  # fmt: skip


def test_a_task_that_is_asked_twice_has_all_questions_of_both(context, monkeypatch):
    monkeypatch.chdir(ROOT)
    first, all_of_them = {"task": "gsm8k", "limit": 10}, {"task": "gsm8k", "num_fewshot": 0}
    for number, tasks in enumerate(([first, all_of_them], [all_of_them, first])):
        found = rows(context, tasks=tasks, data_dir="data")
        assert [row["document"] for row in found] == list(range(1319))
        said = context.events.read_text()
        assert said.count("1319 questions of gsm8k") == number + 1
        assert "leaves" not in said
    found = rows(context, tasks=[first, {**all_of_them, "limit": 20}], data_dir="data")
    assert [row["document"] for row in found] == list(range(20))
    assert "20 questions of gsm8k; `limit` leaves 1299 out" in context.events.read_text()


def test_an_unknown_task_is_one_line(context):
    with pytest.raises(UserError, match="no task, group, tag or file 'gsm9k'"):
        rows(context, tasks=["gsm9k"])
