"""The report shows what a model said while it was trained on it."""

import json

import fake_store
import pytest

from cordee.errors import Fault


def test_completions_of_some_steps_are_shown_from_the_worst_to_the_best(report):
    folder = report((*fake_store.MODELS[2:], "grpo"))
    (training,) = json.loads((folder / "report.json").read_text(encoding="utf-8"))["completions"]
    assert training["rows"] == 40  # what was held out is none of them
    assert [step["step"] for step in training["steps"]] == [1, 4, 7, 10]
    shown = training["steps"][-1]["shown"]
    assert [row["reward"] for row in shown] == [0.0, 0.5, 0.75]
    assert shown[-1]["completion"].startswith("3 of step 10")
    assert shown[-1]["prompt"].startswith("How many?")
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "reward 0.75, correct 1" in page
    assert "entropy fell" in page
    assert fake_store.HOSTILE not in page


def test_a_report_without_such_a_training_has_no_such_section(report):
    folder = report()
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["completions"] == []
    assert "Completions in training" not in (folder / "index.html").read_text(encoding="utf-8")


def test_a_line_that_is_no_completion_is_a_fault(report, store):
    file = store["grpo"] / "completions.jsonl"
    file.write_text('{"step": 1}\n', encoding="utf-8")
    fake_store.rehash(store["grpo"])
    with pytest.raises(Fault, match="line 1 is no completion"):
        report(("grpo",))
