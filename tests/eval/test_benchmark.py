"""What benchmarks and samples are told, and what they do when they are killed; transformers measures here."""

import json
from pathlib import Path

import pytest

from cordee.errors import Stopped, UserError
from cordee.stage import Context
from eval import benchmark, generate

TASKS = Path(__file__).resolve().parents[2] / "examples" / "udhr" / "tasks"


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


def test_models_that_were_measured_before_a_stop_are_not_measured_again(checkpoints, held_out, context):
    only_first = settings({"first": checkpoints["first"]}, held_out)
    benchmark.run(only_first, context)
    before = json.loads((context.out / "results.json").read_text())["models"][0]
    files = sorted(path.name for path in (context.out / "lm_eval" / "first").iterdir())
    (context.events.parent / "stop").touch()
    with pytest.raises(Stopped, match="model 1 of 2"):
        benchmark.run(settings(checkpoints, held_out), context)
    (context.events.parent / "stop").unlink()
    metrics = benchmark.run(settings(checkpoints, held_out), context)
    table = json.loads((context.out / "results.json").read_text())
    assert [row["name"] for row in table["models"]] == ["first", "second"]
    assert table["models"][0] == before
    assert sorted(path.name for path in (context.out / "lm_eval" / "first").iterdir()) == files
    assert table["engine"]["name"] == metrics["engine"] == "transformers"
    assert table["tasks"]["language_choice"]["chance"] == 0.25
    assert metrics["rows"] == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: x", "tasks: is no task file"),
        ("[1", "tasks: is no task file"),
        ((TASKS / "language_choice.yaml").read_text().replace("test_split: test", ""), "it has no test_split"),
        ((TASKS / "language_choice.yaml").read_text().replace("higher_is_better", "higher"), "'higher_is_better'"),
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


def sampling(checkpoints, held_out, **changes):
    return generate.Config.model_validate(
        {
            "models": {name: str(path) for name, path in checkpoints.items()},
            "prompts": str(held_out["language"]),
            "max_prompts": 2,
            "max_tokens": 6,
            "engine": "transformers",
            **changes,
        }
    )


def test_all_models_answer_the_same_prompts_spread_over_the_file(checkpoints, held_out, context):
    assert generate.run(sampling(checkpoints, held_out), context) == {"rows": 2, "engine": "transformers"}
    rows = [json.loads(line) for line in (context.out / "samples.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in rows] == ["German", "French"]
    assert all(set(row["outputs"]) == {"first", "second"} for row in rows)
    assert rows[0]["outputs"]["first"] != rows[0]["outputs"]["second"]
    assert json.loads((context.out / "engine.json").read_text())["name"] == "transformers"


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 1 is no JSON"), ('{"prompt": "x"}', "row 1 has no 'answer'"), ("", "holds no prompt")],
)
def test_prompts_that_are_none_are_one_line(line, message, checkpoints, context, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=message):
        generate.run(sampling(checkpoints, {"language": path}), context)


def test_a_prompt_that_is_too_long_is_an_error_and_not_cut(checkpoints, held_out, context):
    with pytest.raises(UserError, match=r"max_length: prompt 1 has \d+ tokens, and 14 fit"):
        generate.run(sampling(checkpoints, held_out, max_length=20), context)


def test_a_prompt_that_spells_out_a_special_token_is_an_error(checkpoints, held_out, context, tmp_path):
    row = json.loads(held_out["language"].read_text().splitlines()[0])
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({**row, "prompt": "<|assistant_start|>deu"}) + "\n")
    with pytest.raises(UserError, match=r"prompts: prompt 1: a text spells out .*<\|assistant_start\|>"):
        generate.run(sampling(checkpoints, {"language": path}), context)


def test_a_line_separator_in_a_text_ends_no_line(tmp_path):
    from eval import prompts

    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "one\u2028two\u0085three", "answer": "a"}, {"prompt": "x", "answer": "b"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert prompts.read(path) == rows


def test_a_sampled_text_does_not_depend_on_the_batch(checkpoints):
    from cordee.compute.model import open_model
    from eval import prompts

    folder = checkpoints["first"]
    model = open_model(folder)
    asked = [[0, 40 + number, 50, 60] for number in range(4)]
    one, other = (prompts.generate(model, folder, asked, 8, 1.0, 5, size) for size in (1, 4))
    assert one == other
    assert one != prompts.generate(model, folder, asked, 8, 1.0, 6, 1)


def test_a_proof_of_chats_drops_none_in_silence(checkpoints, tmp_path):
    from eval import parity

    chat = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(chat)}\n{{\n{json.dumps(chat)}")
    with pytest.raises(UserError, match="line 2 is no JSON"):
        parity.read(path, 8, checkpoints["first"], 64)
    path.write_text(f"{json.dumps(chat)}\n{json.dumps(chat)}")
    assert len(parity.read(path, 8, checkpoints["first"], 64)[0]) == 2


def test_a_models_figures_are_said_in_one_line():
    from eval import harness

    results = {
        "choice": {"acc": 0.25, "acc_stderr": 0.125},
        "text": {"bits_per_byte": 2.0, "bits_per_byte_stderr": None},
    }
    assert harness.said(results) == "choice acc 0.2500 ± 0.1250; text bits_per_byte 2.0000"


@pytest.mark.parametrize("count", [1, 2, 5, 7, 12, 20])
def test_prompts_are_spread_over_languages_and_passages_whatever_their_order(count):
    from eval import prompts

    by_article = [{"language": tag, "article": article} for article in range(4) for tag in ("de", "fr", "it")]
    by_language = sorted(by_article, key=lambda row: row["language"])
    for rows in (by_article, by_language):
        chosen = prompts.spread(rows, count)
        assert len(chosen) == min(count, len(rows))
        assert chosen == [row for row in rows if row in chosen]
        counts = [sum(row["language"] == tag for row in chosen) for tag in ("de", "fr", "it")]
        assert max(counts) - min(counts) <= 1
        if count == 5:
            assert len({row["article"] for row in chosen}) > 2
    assert prompts.spread(by_article, count) == prompts.spread(by_article, count)


def test_a_limit_is_spread_over_the_languages(checkpoints, held_out, context, tmp_path):
    lines = held_out["language"].read_text().splitlines(keepends=True)
    by_language = tmp_path / "sorted.jsonl"
    by_language.write_text("".join(sorted(lines, key=lambda line: json.loads(line)["language"])))
    benchmark.run(settings({"first": checkpoints["first"]}, {"language": by_language}, limit=2), context)
    (row,) = json.loads((context.out / "results.json").read_text())["models"]
    assert set(row["by_language"]["language_choice"]) == {"de", "fr"}
    assert row["documents"] == 2


def test_a_name_that_is_no_folders_is_refused(checkpoints, held_out):
    for name in ("../first", "a/b", ""):
        with pytest.raises(ValueError, match="should match pattern"):
            settings({name: checkpoints["first"]}, held_out)


def test_a_model_whose_files_of_lm_eval_are_gone_is_measured_again(checkpoints, held_out, context):
    import shutil

    only_first = settings({"first": checkpoints["first"]}, held_out)
    benchmark.run(only_first, context)
    shutil.rmtree(context.out / "lm_eval" / "first")
    benchmark.run(only_first, context)
    assert len(list((context.out / "lm_eval" / "first").glob("samples_language_choice_*.jsonl"))) == 1


def test_a_chat_task_on_a_model_without_a_template_is_one_line(checkpoints, held_out, context, tmp_path):
    import shutil

    bare = shutil.copytree(checkpoints["first"], tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"models\.bare: has no chat template, and language_choice asks in chats"):
        benchmark.run(settings({"bare": bare}, held_out), context)


def test_vllm_where_there_is_none_is_an_error(monkeypatch):
    from cordee.compute import engine

    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"^vLLM is not installed; pip install '[^:]*$"):  # no key of one caller
        engine.choose("vllm")
