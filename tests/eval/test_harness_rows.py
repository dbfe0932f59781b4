"""What the stage makes of lm-eval's own rows: filters, examples, and texts that a loader took for times."""

import json

import pytest

from cordee.errors import UserError
from cordee.stage import Context
from eval import benchmark

TASK = """
task: dates
dataset_path: json
dataset_kwargs: {data_files: {test: language}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
filter_list:
  - {name: never, filter: [{function: regex, regex_pattern: "never (there)"}, {function: take_first}]}
  - {name: always, filter: [{function: regex, regex_pattern: "(.*)"}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0, chat: false, chance: null, description: names a day}
"""


@pytest.fixture
def measured(checkpoints, tmp_path):
    """Runs a task on four rows whose answers are dates; returns the row of its model and what was noted."""

    def call(task=TASK, without=None, **how):
        rows = [{"prompt": f"day {day}", "answer": f"1990-05-0{day}", "language": "de"} for day in range(1, 5)]
        for row in rows[2:]:
            row.pop(without, None)
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "dates.yaml").write_text(task)
        (tmp_path / "out").mkdir(exist_ok=True)
        context = Context(out=tmp_path / "out", seed=3, events=tmp_path / "events.jsonl")
        config = {
            "models": {"first": str(checkpoints["first"])}, "tasks": [{"task": str(tmp_path / "dates.yaml"), **how}],
            "data": {"language": str(tmp_path / "rows.jsonl")}, "engine": "transformers", "max_length": 256,
        }  # fmt: skip
        benchmark.run(benchmark.Config.model_validate(config), context)
        return json.loads((tmp_path / "out" / "results.json").read_text())["models"][0]

    return call


def test_each_document_counts_once_and_each_filter_has_its_own_figure(measured):
    row = measured()
    assert row["documents"] == 4
    assert [(one["metric"], one["filter"]) for one in row["results"]] == [
        ("exact_match", "never"), ("exact_match", "always"),
    ]  # fmt: skip
    for one in row["results"]:
        assert one["by_language"] == {"de": one["value"]}
        assert one["documents"] == 4
    assert (row["tasks"][0]["metric"], row["tasks"][0]["filter"]) == ("exact_match", "never")


def test_the_metric_that_is_shown_first_is_the_one_that_was_asked_for(measured):
    assert measured(metric="exact_match,always")["tasks"][0]["filter"] == "always"
    with pytest.raises(
        UserError, match=r"tasks\.metric: dates has no metric 'exact_macth'; did you mean 'exact_match'\?"
    ):
        measured(metric="exact_macth,always")
    with pytest.raises(UserError, match=r"tasks\.metric: dates has no filter 'alwys'; did you mean 'always'\?"):
        measured(metric="exact_match,alwys")


@pytest.mark.parametrize(("longest", "is_said"), [(4, True), (64, False)])
def test_answers_that_may_be_cut_off_are_counted(measured, longest, is_said):
    text = TASK.replace("max_gen_toks: 4", f"max_gen_toks: {longest}").replace(
        'until: ["\\n"]', "until: ['e', 'a', ' ']"
    )
    notes = measured(text)["notes"]["dates"]
    assert any("as many tokens as `max_gen_toks` allows" in note for note in notes) == is_said


def test_a_text_that_was_read_as_a_time_is_said(measured):
    assert "answer: the file's text was read as a time, which is written differently" in measured()["notes"]["dates"]


def test_documents_without_a_column_that_others_have_are_counted(measured):
    row = measured(TASK, without="prompt")
    assert "2 of 4 documents have no 'prompt': where a template asks for it, it is 'None'" in row["notes"]["dates"]


def test_a_document_that_could_be_its_own_example_is_refused(measured):
    with pytest.raises(UserError, match=r"num_fewshot: dates: examples would be drawn .*; `fewshot_split: test` in"):
        measured(TASK + "num_fewshot: 2\n")
    assert measured(TASK + "num_fewshot: 1\nfewshot_split: test\n")["documents"] == 4
