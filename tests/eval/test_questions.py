"""Questions of one's own, without a task file: what lm-eval makes of them, and what can't be asked."""

import json

import pytest
from figures import figure

from cordee.errors import UserError
from cordee.stage import Context
from eval import benchmark
from eval.measuring import questions

OWN = [{"question": "2 + 2?", "answer": 4}, {"question": "Capital of France?", "answer": "Paris", "note": None}]
CHOICES = [
    {"question": "2 + 2?", "choices": ["3", "four"], "answer": "four"},
    {"question": "3 + 3?", "choices": ["six", "seven"], "answer": 0},
    {"question": "1 + 1?", "choices": ["one", "two", "three"], "answer": "B"},
    {"question": "0 + 1?", "choices": {"text": ["x", "one"], "label": ["1", "2"]}, "answer": "2"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measured(checkpoints, tmp_path, **keys):
    (tmp_path / "out").mkdir(exist_ok=True)
    context = Context(out=tmp_path / "out", seed=3, events=tmp_path / "events.jsonl")
    config = {"models": {"first": str(checkpoints["first"])}, "engine": "transformers", "max_length": 512, **keys}
    benchmark.run(benchmark.Config.model_validate(config), context)
    return json.loads((tmp_path / "out" / "results.json").read_text())["models"][0]


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_file_is_enough(checkpoints, tmp_path, is_chat):
    own, choices = write(tmp_path / "my-own.v2.jsonl", OWN), write(tmp_path / "choices.jsonl", CHOICES)
    asked = {"own": str(own), "choices": str(choices)}
    row = measured(checkpoints, tmp_path, questions=asked, apply_chat_template=is_chat, gen_kwargs={"max_gen_toks": 4})
    assert {one["metric"] for one in row["results"] if one["task"] == "own"} == {"exact_match", "contains"}
    assert {one["metric"] for one in row["results"] if one["task"] == "choices"} == {"acc", "acc_norm"}
    assert figure(row, "choices")["documents"] == 4
    told = json.loads((tmp_path / "out" / "tasks" / "choices.jsonl").read_text().splitlines()[3])
    assert (told["choices"][told["answer"]], told["question"]) == ("one", "0 + 1?")
    (samples,) = (tmp_path / "out").rglob("samples_own_*.jsonl")
    sent = json.loads(samples.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"]
    assert ("Question: 2 + 2?\nAnswer:" in sent) != is_chat
    row = measured(checkpoints, tmp_path, questions=str(own), gen_kwargs={"max_gen_toks": 4})
    assert figure(row, "my_own")["documents"] == 2


@pytest.mark.parametrize(
    ("said", "wanted", "exact", "contains"),
    [
        ("Paris.", "paris", 1.0, 1.0),
        ("It is Paris, of course", "Paris", 0.0, 1.0),
        ("Parisian", "Paris", 0.0, 0.0),
        ("", "Paris", 0.0, 0.0),
        ("14", "4", 0.0, 0.0),
        ("New  York", "new york", 1.0, 1.0),
        ("首都是巴黎。", "巴黎", 0.0, 1.0),
        ("巴黎", "巴黎。", 1.0, 1.0),
        ("≠", "=", 0.0, 0.0),
        ("का", "कि", 0.0, 0.0),
        ("দিন।", "দিন", 1.0, 1.0),
        ("cafe\u0301", "café", 1.0, 1.0),
        ("cafe\u0301", "cafe", 0.0, 0.0),
        ("5", "-5", 0.0, 0.0),
        ("It is \N{MINUS SIGN}5.", "-5", 0.0, 1.0),
        ("pages 3-5", "5", 0.0, 1.0),
        ("3.5", "3", 0.0, 0.0),
        ("It's 3.5kg.", "3.5", 0.0, 1.0),
    ],
)
def test_an_answer_is_judged_by_its_words(said, wanted, exact, contains):
    assert questions.judge({"answer": wanted}, [said]) == {"exact_match": exact, "contains": contains}
    several = {"answer": "something else", "answers": ["something else", wanted]}
    assert questions.judge(several, [said]) == {"exact_match": exact, "contains": contains}


def test_a_prompt_is_a_question(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "2 + 2?", "answer": "4"}) + "\n")
    questions.check(path)
    questions.write("task", path, tmp_path, is_chat=True)
    assert json.loads((tmp_path / "task.jsonl").read_text())["question"] == "2 + 2?"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no question"),
        ([{"question": "x"}], r"line 1 has no answer: its columns are 'question'"),
        ([{"text": "x", "answer": "y"}], r"line 1 has no question: its columns are 'text', 'answer'"),
        ([{"prompt": [], "answer": "y"}], r"line 1 has no question: its columns are 'prompt', 'answer'"),
        ([{"question": " ", "answer": "y"}], "line 1 has no question"),
        ([{"question": "x", "answer": ""}], "line 1 has no answer"),
        ([{"question": "x", "answer": ["y", None]}], r"the answer in line 1 is no text, .*: \['y', None\]"),
        ([{"question": "x", "answer": []}], r"the answer in line 1 is no text, no number and no list of them: \[\]"),
        ([OWN[0], CHOICES[0]], "some rows have choices, others not"),
        ([{"question": "x", "choices": ["a"], "answer": "a"}], "the choices in line 1 are no list of texts"),
        ([{"question": "x", "choices": ["a", 5], "answer": "a"}], "the choices in line 1 are no list of texts"),
        ([{"question": "x", "choices": ["a", "b"], "answer": "c"}], "the answer 'c' in line 1 is none of the choices"),
        ([{"question": "x", "choices": ["1", "2"], "answer": 1}], "the answer 1 in line 1 may be one of several"),
        ([{"question": "x", "choices": ["a", "b"], "answer": 2}], "the answer 2 in line 1 is none of the choices"),
        ([{"question": "x", "choices": ["a", "b"], "answer": True}], "the answer True in line 1 is none"),
    ],
)
def test_what_is_no_question_is_one_line(rows, message, checkpoints, tmp_path):
    with pytest.raises(UserError, match=message):
        measured(checkpoints, tmp_path, questions=str(write(tmp_path / "q.jsonl", rows)))


def test_without_tasks_and_questions_there_is_nothing_to_ask(checkpoints):
    with pytest.raises(UserError, match="tasks: missing"):
        benchmark.Config.model_validate({"models": {"first": str(checkpoints["first"])}})
