"""What benchmarks and samples are told, and what they do when they are killed; transformers measures here."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from figures import figure

from cordee.errors import UserError
from cordee.stage import Context
from eval import benchmark, generate

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


def test_each_model_is_asked_in_its_own_template_and_tokens(checkpoints, held_out, context, tmp_path):
    """Its answers are those that it gives alone, whatever the first model's template and ids are."""
    other = shutil.copytree(checkpoints["second"], tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }} Answer:")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["e"], ids["n"] = ids["n"], ids["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    answers = {}
    for models in ({"other": other}, {**checkpoints, "other": other}):
        generate.run(sampling(models, held_out), context)
        rows = [json.loads(line) for line in (context.out / "samples.jsonl").read_text().splitlines()]
        answers[len(models)] = [row["outputs"]["other"] for row in rows]
    assert answers[1] == answers[3]


def test_greedy_is_greedy_whatever_the_models_generation_config_says(checkpoints, held_out, context, tmp_path):
    """vLLM is given none of it either."""
    other = shutil.copytree(checkpoints["first"], tmp_path / "other")
    own = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**own, "repetition_penalty": 5.0}))
    generate.run(sampling({"first": checkpoints["first"], "other": other}, held_out), context)
    rows = [json.loads(line) for line in (context.out / "samples.jsonl").read_text().splitlines()]
    assert all(row["outputs"]["first"] == row["outputs"]["other"] for row in rows)


def test_a_models_stop_tokens_are_read_once(checkpoints, monkeypatch):
    from cordee.compute.model import open_model
    from eval.measuring import prompts

    folder, read = checkpoints["first"], []
    monkeypatch.setattr(prompts, "stop_token_ids", lambda path: read.append(path) or [1])
    prompts.generate(open_model(folder), folder, [[0, 40], [0, 41], [0, 42]], 2, 0.0, 0, 1)
    assert read == [folder]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: no JSON object"),
        ('{"question": "x", "answer": "y"}', "line 1: can't be told what it is: its columns are 'question', 'answer'"),
        ('{"prompt": 5}', "line 1: prompt is no text and no list of messages"),
        ('{"prompt": "x", "answer": ["y"]}', "the answer in line 1 is no text; `columns: {answer: other}`"),
        ("", "holds no prompt"),
    ],
)
def test_prompts_that_are_none_are_one_line(line, message, checkpoints, context, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=message):
        generate.run(sampling(checkpoints, {"language": path}), context)


def test_prompts_need_no_answer(checkpoints, context, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "deu"}\n{"prompt": "fra", "answer": 5}\n')
    assert generate.run(sampling({"first": checkpoints["first"]}, {"language": path}), context)["rows"] == 2
    rows = [json.loads(line) for line in (context.out / "samples.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in rows] == [None, "5"]


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
    from eval.measuring import prompts

    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "one\u2028two\u0085three", "answer": "a"}, {"prompt": "x", "answer": "b"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [{key: row[key] for key in ("prompt", "answer")} for row in prompts.read(path, {})] == rows


def test_prompts_are_read_from_any_data_file_with_their_columns_renamed(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from eval.measuring import prompts

    path = tmp_path / "test.parquet"
    pq.write_table(pa.table({"question": ["2 + 2?"], "answer": ["4"], "kind": ["sum"], "note": [None]}), path)
    (row,) = prompts.read(path, {"question": "prompt"})
    assert row.pop("messages") == [{"role": "user", "content": "2 + 2?"}]
    assert row == {"prompt": "2 + 2?", "answer": "4", "kind": "sum"}
    with pytest.raises(UserError, match=r"row 1: has no column 'questoin', .*; did you mean 'question'\?"):
        prompts.read(path, {"questoin": "prompt"})
    with pytest.raises(UserError, match="is a folder: name one of its files"):
        prompts.read(tmp_path, {})


def test_a_base_model_without_a_chat_template_continues_the_prompt(checkpoints, tmp_path):
    import shutil

    from eval.measuring import prompts

    bare, said = tmp_path / "bare", []
    shutil.copytree(checkpoints["first"], bare, ignore=shutil.ignore_patterns("chat_template.jinja"))
    asked = [[{"role": "user", "content": "Alle Menschen"}]]
    (ids,) = prompts.encode(bare, asked, 64, tmp_path, said.append)
    from cordee.compute.tokenizer import open_tokenizer

    assert ids == open_tokenizer(bare)("Alle Menschen")["input_ids"]
    assert said == ["bare has no chat template: it continues each prompt as it stands"]


def test_a_sampled_text_does_not_depend_on_the_batch(checkpoints):
    from cordee.compute.model import open_model
    from eval.measuring import prompts

    folder = checkpoints["first"]
    model = open_model(folder)
    asked = [[0, 40 + number, 50, 60] for number in range(4)]
    one, other = (prompts.generate(model, folder, asked, 8, 1.0, 5, size) for size in (1, 4))
    assert one == other
    assert one != prompts.generate(model, folder, asked, 8, 1.0, 6, 1)


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


@pytest.mark.parametrize("count", [1, 2, 5, 7, 12, 20])
def test_prompts_are_spread_over_languages_and_passages_whatever_their_order(count):
    from eval.measuring import prompts

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
