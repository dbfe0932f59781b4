"""What benchmarks are told, and what they do when they are killed; transformers measures here."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from figures import figure

from cordee.errors import UserError
from cordee.stage import Context
from eval import benchmark

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "examples" / "udhr" / "tasks"


@pytest.fixture
def context(tmp_path):
    (tmp_path / "out").mkdir()
    return Context(out=tmp_path / "out", seed=3, events=tmp_path / "events.jsonl")


def settings(checkpoints, held_out, **changes):
    return benchmark.Config.model_validate(
        {
            "models": {name: str(path) for name, path in checkpoints.items()},
            "tasks": [str(TASKS / "language_choice.yaml")],
            "data": {name: str(path) for name, path in held_out.items()},
            "engine": "transformers",
            "max_length": 256,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: x", "tasks: lm-eval can't load it: "),
        ("[1", "tasks: is no task file"),
        ((TASKS / "language_choice.yaml").read_text().replace("test_split: test", ""), "lm-eval can't load it: "),
        (
            (TASKS / "language_choice.yaml").read_text().replace("data_files", "files"),
            "`dataset_kwargs: {data_files: {…}}` does not say by split which",
        ),
        (
            (TASKS / "language_choice.yaml").read_text().replace("test: language", "test: [language]"),
            "needs data named ['language']",
        ),
        (
            (TASKS / "language_choice.yaml").read_text().replace("test: language", "test: langauge"),
            "did you mean 'language'?",
        ),
    ],
)
def test_a_task_file_that_is_wrong_is_one_line(text, message, checkpoints, held_out, context, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        benchmark.run(settings(checkpoints, held_out, tasks=[str(path)]), context)
    assert message in str(caught.value)
    assert "task.yaml" in str(caught.value)


def test_two_tasks_of_one_name_are_an_error_that_names_both_files(checkpoints, held_out, context, tmp_path):
    paths = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    for path in paths:
        path.write_text((TASKS / "language_choice.yaml").read_text())
    with pytest.raises(UserError, match=r"two\.yaml: tasks: its name 'language_choice' is that of \S+one\.yaml too"):
        benchmark.run(settings(checkpoints, held_out, tasks=list(map(str, paths))), context)


def test_a_proof_of_chats_drops_none_in_silence(checkpoints, tmp_path):
    from eval.measuring import parity

    chat = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(chat)}\n{{\n{json.dumps(chat)}")
    with pytest.raises(UserError, match="row 2: no JSON object"):
        parity.read(path, 8, checkpoints["first"], 64)
    path.write_text(f"{json.dumps(chat)}\n{json.dumps(chat)}")
    assert len(parity.read(path, 8, checkpoints["first"], 64)[0]) == 2


def test_a_models_figures_are_said_in_one_line():
    from eval.measuring import harness

    tasks = [
        {"task": "choice", "asked": "chat", "metric": "acc", "filter": "none", "is_asked": True},
        {"task": "text", "asked": "plain", "metric": "bits_per_byte", "filter": "none", "is_asked": True},
        {"task": "inside", "asked": "plain", "metric": "acc", "filter": "none", "is_asked": False},
    ]
    figures = [("choice", "chat", "acc", 0.25, 0.125), ("text", "plain", "bits_per_byte", 2.0, None)]
    figures += [("choice", "chat", "acc_norm", 0.5, 0.1), ("inside", "plain", "acc", 0.5, 0.1)]
    names = ("task", "asked", "metric", "value", "standard_error")
    results = [{**dict(zip(names, row, strict=True)), "filter": "none"} for row in figures]
    assert harness.said({"tasks": tasks, "results": results}) == "choice acc 0.2500 ± 0.1250; text bits_per_byte 2.0000"


@pytest.mark.parametrize("limit", [None, 5])
def test_documents_without_a_language_are_a_group_of_their_own(checkpoints, context, tmp_path, limit):
    documents = [{"text": f"Menschen {n} hommes", "language": tag} for n in range(3) for tag in ("de", None, "")]
    pq.write_table(pa.Table.from_pylist(documents), tmp_path / "heldout.parquet")
    task, data = (
        str(ROOT / "eval" / "tasks" / "heldout_bits_per_byte.yaml"),
        {"documents": tmp_path / "heldout.parquet"},
    )
    only_first = {"first": checkpoints["first"]}
    benchmark.run(settings(only_first, data, tasks=[task], limit=limit), context)
    row = json.loads((context.out / "results.json").read_text())["models"][0]
    assert list(figure(row, "heldout_bits_per_byte")["by_language"]) == ["", "de"]


def test_a_limit_is_spread_over_the_languages(checkpoints, held_out, context, tmp_path):
    lines = held_out["language"].read_text().splitlines(keepends=True)
    by_language = tmp_path / "sorted.jsonl"
    by_language.write_text("".join(sorted(lines, key=lambda line: json.loads(line)["language"])))
    benchmark.run(settings({"first": checkpoints["first"]}, {"language": by_language}, limit=2), context)
    (row,) = json.loads((context.out / "results.json").read_text())["models"]
    assert set(figure(row, "language_choice")["by_language"]) == {"de", "fr"}
    assert row["documents"] == 2


def test_a_name_that_is_no_folders_is_refused(checkpoints, held_out):
    for name in ("../first", "a/b", ""):
        with pytest.raises(ValueError, match="should match pattern"):
            settings({name: checkpoints["first"]}, held_out)


def test_a_model_whose_files_of_lm_eval_are_gone_is_measured_again(checkpoints, held_out, context):
    only_first = settings({"first": checkpoints["first"]}, held_out)
    benchmark.run(only_first, context)
    shutil.rmtree(context.out / "lm_eval" / "first")
    benchmark.run(only_first, context)
    assert len(list((context.out / "lm_eval" / "first").glob("chat/samples_language_choice_*.jsonl"))) == 1


def test_a_chat_task_on_a_model_without_a_template_is_one_line(checkpoints, held_out, context, tmp_path):
    bare = shutil.copytree(checkpoints["first"], tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"models\.bare: has no chat template, and language_choice is asked in chats"):
        benchmark.run(settings({"bare": bare}, held_out), context)


def test_vllm_where_there_is_none_is_an_error(monkeypatch):
    from cordee.compute import engine, serving

    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"^vLLM is not installed; pip install '[^:]*$"):  # no key of one caller
        serving.require_served({}, engine.Settings("vllm"))
