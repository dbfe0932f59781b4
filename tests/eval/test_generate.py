"""Answers of tiny real models by transformers; by vLLM they are in `test_engine.py`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from generation import answers, config, context_in, notes, rows_in, samples, written

from cordee.chat.problems import Problems
from cordee.chat.source import Limits, Rules, Source
from cordee.config import Input
from cordee.errors import Stopped, UserError
from eval import generate

ADD = {"type": "function", "function": {"name": "add", "description": "a + b", "parameters": {"type": "object"}}}
HOT = {"temperature": 1.0, "top_p": 0.95, "top_k": 40}


@pytest.fixture
def context(tmp_path):
    return context_in(tmp_path)


@pytest.fixture
def first(checkpoints):
    return {"first": checkpoints["first"]}


@pytest.fixture
def bare(checkpoints, tmp_path):
    """A base model without a chat template."""
    return {
        "bare": shutil.copytree(
            checkpoints["first"], tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template.jinja")
        )
    }


def test_all_models_answer_the_same_prompts_side_by_side(checkpoints, held_out, context):
    told = generate.run(config(checkpoints, held_out["language"]), context)
    assert (told["rows"], told["prompts"], told["engine"]) == (4, 2, "transformers")
    rows = samples(context)
    assert [row["reference"] for row in rows] == ["German", "French"]
    assert all(set(row["outputs"]) == {"first", "second"} for row in rows)
    assert rows[0]["outputs"]["first"] != rows[0]["outputs"]["second"]
    engine = json.loads((context.out / "engine.json").read_text())
    assert (engine["name"], engine["dtype"]) == ("transformers", "float32")
    assert sorted(path.name for path in context.out.iterdir()) == [
        "answers", "engine.json", "prompts.json", "samples.jsonl",
    ]  # fmt: skip
    assert "2 of 4 prompts are answered (`max_prompts`)" in notes(context)
    for name in checkpoints:
        assert [row["messages"][-1]["content"] for row in answers(context, name)] == [
            row["outputs"][name] for row in rows
        ]


def test_a_row_of_answers_has_its_prompt_and_what_is_told_of_it(first, context, tmp_path):
    turns = [
        {"role": "user", "content": "Tous"},
        {"role": "assistant", "content": "les hommes"},
        {"role": "user", "content": "naissent"},
    ]
    prompts = [
        {"prompt": "deu", "answer": "German", "source": "a"},
        {"prompt": turns, "system": "Be brief."},
        {"messages": [*turns, {"role": "assistant", "content": "libres"}], "model": "other"},
    ]
    generate.run(config(first, written(tmp_path / "p.jsonl", prompts), max_prompts=None), context)
    rows = answers(context)
    assert [row["messages"][:-1] for row in rows] == [
        [{"role": "user", "content": "deu"}],
        [{"role": "system", "content": "Be brief."}, turns[0], {**turns[1], "train": False}, turns[2]],
        [turns[0], {**turns[1], "train": False}, turns[2]],
    ]
    assert [row.get("answer") for row in rows] == ["German", None, "libres"]
    assert [(row["prompt_id"], row["sample"], row["model"]) for row in rows] == [(n, 0, "first") for n in range(3)]
    assert rows[0]["source"] == "a"
    cut = [row["tokens"] for row in rows if row["finish_reason"] == "length"]
    assert {*cut} == {6}
    assert all(row["tokens"] <= 6 for row in rows)
    (said,) = [note for note in notes(context) if "cut off" in note]
    assert said == f"first: {len(cut)} of 3 answers ({100 * len(cut) / 3:.1f}%) are cut off at max_tokens=6"


def test_partitions_have_the_answers_of_the_whole(first, held_out, tmp_path):
    keys = {"n": 2, "sampling": {"temperature": 1.0}, "max_prompts": None}
    found = []
    for name, partition in (("whole", [1, 1]), ("a", [1, 3]), ("b", [2, 3]), ("c", [3, 3])):
        context = context_in(tmp_path / name)
        generate.run(config(first, held_out["language"], partition=partition, **keys), context)
        found.append(answers(context))
    whole, *parts = found
    assert [len(part) for part in parts] == [4, 2, 2]
    place = lambda row: (row["prompt_id"], row["sample"])  # noqa: E731
    assert sorted((row for part in parts for row in part), key=place) == whole
    with pytest.raises(UserError, match="partition: 4 prompts can't be divided into 5 parts"):
        generate.run(config(first, held_out["language"], partition=[1, 5], **keys), context_in(tmp_path / "d"))
    with pytest.raises(UserError, match="partition: part 3 of 2 does not exist"):
        config(first, held_out["language"], partition=[3, 2])


def test_answers_to_more_than_vllm_reads_at_once_are_drawn_too(first, context, tmp_path):
    """On a CPU it can't set its random numbers back after a prompt that it read in part."""
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{number} すべての人間は、生まれながらにして自由"} for number in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pytest.importorskip("vllm", reason="vLLM is not installed on this platform")
    keys = {"sampling": {"temperature": 1.0}, "max_prompts": None, "batch_size": 160, "n": 4, "engine": "vllm"}
    assert generate.run(config(first, file, enforce_eager=True, **keys), context)["rows"] == 160


def test_special_tokens_that_an_answer_lacks_are_counted(first, held_out, context):
    from cordee.compute.tokenizer import open_tokenizer

    keys = {"n": 8, "max_tokens": 64, "sampling": {"temperature": 1.0}}
    generate.run(config(first, held_out["language"], **keys), context)
    rows = answers(context)
    counts = [row["special_tokens"] for row in rows]
    special = open_tokenizer(first["first"]).all_special_tokens
    assert sum(counts) > 0
    assert not any(token in row["messages"][-1]["content"] for row in rows for token in special)
    (said,) = [note for note in notes(context) if "special tokens" in note]
    assert said.startswith(f"first: {sum(count > 0 for count in counts)} of {len(rows)} answers")


def test_tools_are_asked_as_the_template_has_them(checkpoints, context, tmp_path):
    from cordee.chat.templates import Template
    from cordee.compute.tokenizer import open_tokenizer
    from eval.measuring import prompts

    tokenizer = open_tokenizer(checkpoints["first"])
    tokenizer.chat_template = (
        "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% if deep %}deep{% endif %}"
        "{% for message in messages %}<|{{ message.role }}_start|>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant_start|>{% endif %}"
    )
    asked, settings = [{"role": "user", "content": "1 + 1?"}], {"deep": True}
    rows = [
        {"prompt": "1 + 1?", "tools": [ADD], "chat_template_kwargs": settings},
        {"messages": asked, "tools": json.dumps([ADD]), "chat_template_kwargs": settings},
    ]
    encoder = prompts.Encoder("m", tokenizer, Template(tokenizer), 1000)
    found = prompts.choose(Source(path=Input(written(tmp_path / "p.jsonl", rows))), None, context.note)
    whole, problems = prompts.checked(found, [encoder], context, may_drop=False)
    wanted = tokenizer.apply_chat_template(
        asked, tools=[ADD], add_generation_prompt=True, return_dict=False, **settings
    )
    assert "add" in tokenizer.decode(wanted)
    assert encoder.encode(list(whole), problems) == [wanted, wanted]


def test_several_samples_have_seeds_of_their_own_whatever_is_asked_beside_them(first, held_out, tmp_path):
    told = {}
    for name, changes in {
        "whole": {},
        "small parts": {"batch_size": 1},
        "one prompt": {"max_prompts": 1},
        "other seed": {"sampling": {**HOT, "seed": 4}},
    }.items():
        context = context_in(tmp_path / name)
        chosen = {"n": 3, "sampling": HOT, "max_prompts": None, "max_tokens": 12, **changes}
        generate.run(config(first, held_out["language"], **chosen), context)
        told[name] = answers(context)
    whole = told["whole"]
    assert [(row["prompt_id"], row["sample"]) for row in whole] == [(n, k) for n in range(4) for k in range(3)]
    texts = [row["messages"][-1]["content"] for row in whole]
    assert len(set(texts)) == 12
    assert told["small parts"] == whole
    assert told["one prompt"] == whole[:3]
    assert {*texts} & {row["messages"][-1]["content"] for row in told["other seed"]} <= {""}


def test_after_a_kill_finished_parts_are_kept_and_the_answers_are_the_same(checkpoints, held_out, tmp_path):
    """Killed with -9, by the stage's own entry point; it goes on with other parts."""
    rows = rows_in(held_out["language"]) * 3
    keys = {
        "models": {"first": str(checkpoints["first"])}, "max_prompts": None, "n": 2,
        "prompts": str(written(tmp_path / "p.jsonl", rows)), "sampling": HOT, "max_tokens": 12,
        "engine": "transformers",
    }  # fmt: skip
    whole = context_in(tmp_path / "whole")
    generate.run(generate.Config.model_validate(keys), whole)
    (tmp_path / "c.yaml").write_text(json.dumps({**keys, "seed": 3}))
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "eval.generate", "--config", str(tmp_path / "c.yaml"), "--runs", str(runs)]
    process = subprocess.Popen([*command, "batch_size=2"], stderr=subprocess.PIPE, text=True)
    while len(found := sorted(runs.rglob("parts/first/0*.jsonl"))) < 3 and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    _, said = process.communicate()
    assert len(found) >= 3, said
    row, *others = rows_in(found[0])  # marked, to show that it is not generated again
    row["messages"][-1]["content"] += "!"
    written(found[0], [row, *others])
    (found[0].parent / ".000000000-000000001.jsonl.1.tmp").write_text("{")  # as a kill within a part leaves one
    done = subprocess.run([*command, "batch_size=6"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = runs.rglob("answers/first.jsonl")
    expected = rows_in(whole.out / "answers" / "first.jsonl")
    expected[0]["messages"][-1]["content"] += "!"
    assert rows_in(file) == expected


def test_a_model_that_has_answered_is_not_opened_again(checkpoints, held_out, context, monkeypatch):
    from cordee.compute import adapter

    generate.run(config(checkpoints, held_out["language"]), context)
    before = {path: path.read_bytes() for path in context.out.rglob("*") if path.is_file()}
    monkeypatch.setattr(adapter, "open_served", lambda *_, **__: pytest.fail("opened"))
    generate.run(config(checkpoints, held_out["language"]), context)
    assert {path: path.read_bytes() for path in context.out.rglob("*") if path.is_file()} == before


def test_a_stop_is_heard_while_the_prompts_are_read(first, held_out, context):
    chosen = config(first, held_out["language"], batch_size=1)
    (context.events.parent / "stop").touch()
    with pytest.raises(Stopped, match="row 0 of 4 of the prompts; the next run continues from there"):
        generate.run(chosen, context)


def test_what_was_generated_trains_in_sft_on_the_answers_alone(first, held_out, context, tmp_path):
    from cordee.chat import tokenized
    from cordee.compute.tokenizer import open_tokenizer

    prompt = [{"role": role, "content": "Menschen"} for role in ("user", "assistant", "user")]
    path = written(tmp_path / "p.jsonl", [*rows_in(held_out["language"]), {"prompt": prompt}])
    generate.run(config(first, path, n=2, sampling=HOT, max_prompts=None), context)
    tokenizer = open_tokenizer(first["first"])
    source = Source(path=Input(context.out / "answers" / "first.jsonl"))
    rules = Rules(Limits(512, 512, len(tokenizer)), bad_rows="drop")  # an answer that is empty
    found = tokenized.tokenize("chats", tokenizer, source, rules, context, tmp_path / "cache")
    said = [row["messages"][-1]["content"] for row in answers(context)]
    trained = [
        tokenizer.decode(one.ids[one.has_loss], skip_special_tokens=True)
        for one in map(found.conversation, range(len(found)))
    ]
    assert len(said) == 10
    assert trained == [text for text in said if text.strip()]


def test_a_base_model_continues_the_prompt_and_its_rows_are_texts(bare, checkpoints, context, tmp_path):
    from cordee.compute.tokenizer import open_tokenizer
    from eval.measuring import prompts

    path = written(tmp_path / "p.jsonl", [{"prompt": "Alle Menschen"}])
    generate.run(config(bare, path), context)
    (row,) = answers(context, "bare")
    assert row["prompt"] == "Alle Menschen"
    assert row["completion"] == samples(context)[0]["outputs"]["bare"]
    assert "bare has no chat template: it continues each prompt as it stands" in notes(context)
    encoder = prompts.Encoder.of("bare", bare["bare"], 64, (), print)
    chosen = prompts.choose(Source(path=Input(path)), None, print)
    (ids,) = encoder.encode(list(chosen), Problems())
    assert ids == open_tokenizer(checkpoints["first"])("Alle Menschen")["input_ids"]
    with pytest.raises(UserError, match=r"models\.bare: has tools, and the model has no chat template"):
        generate.run(config(bare, written(path, [{"prompt": "x", "tools": [ADD]}])), context)


def test_each_model_is_asked_in_its_own_template_and_tokens(checkpoints, held_out, tmp_path):
    """Its answers are those that it gives alone, whatever the first model's template and ids are."""
    other = shutil.copytree(checkpoints["second"], tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }} Answer:")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["e"], ids["n"] = ids["n"], ids["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = []
    for models in ({"other": other}, {**checkpoints, "other": other}):
        context = context_in(tmp_path / str(len(models)))
        generate.run(config(models, held_out["language"]), context)
        told.append([row["outputs"]["other"] for row in samples(context)])
    assert told[0] == told[1]


def test_greedy_is_greedy_whatever_the_models_generation_config_says(checkpoints, held_out, context, tmp_path):
    """vLLM is given none of it either."""
    other = shutil.copytree(checkpoints["first"], tmp_path / "other")
    own = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**own, "repetition_penalty": 5.0}))
    generate.run(config({"first": checkpoints["first"], "other": other}, held_out["language"]), context)
    assert all(row["outputs"]["first"] == row["outputs"]["other"] for row in samples(context))


def test_transformers_ends_and_draws_as_the_keys_say(checkpoints):
    from cordee.compute.generating import generate as by_transformers
    from cordee.compute.model import open_model
    from eval.measuring.sampling import Sampling

    folder = checkpoints["first"]
    model = open_model(folder)

    def said(**sampling):
        chosen = Sampling(**sampling).for_transformers()
        return by_transformers(model, folder, [[0, 40, 50, 60], [0, 41]], [5, 5], 12, chosen, 2)

    greedy = said()
    assert [(one.tokens, one.finish_reason) for one in greedy] == [(12, "length")] * 2
    end = greedy[0].text[4:6]
    stopped = said(stop=end)[0]
    assert (stopped.text, stopped.finish_reason) == (greedy[0].text[: greedy[0].text.index(end)], "stop")
    assert stopped.tokens < 12
    assert said(temperature=1.0, top_k=1) == greedy
    assert said(temperature=1.0, min_p=1.0) == greedy
    assert said(temperature=1.0, top_p=1e-6) == greedy
    assert said(temperature=2.0) != greedy
    assert said(repetition_penalty=50.0) != greedy
    assert said(min_tokens=12) == greedy
    for refused in ({"presence_penalty": 1.0}, {"frequency_penalty": 0.5}, {"stop": "x", "min_tokens": 2}):
        with pytest.raises(UserError, match=r"sampling\.\w+: transformers .*; engine: vllm "):
            said(**refused)


def test_an_end_token_ends_an_answer_also_where_others_go_on(checkpoints, monkeypatch):
    from cordee.compute import generating
    from cordee.compute.model import open_model
    from eval.measuring.sampling import Sampling

    folder, asked, read = checkpoints["first"], [[0, 40], [0, 41], [0, 42]], []
    model, greedy = open_model(folder), Sampling().for_transformers()
    whole = generating.generate(model, folder, asked, [0, 0, 0], 6, greedy, 3)
    with_ids = open_model(folder).generate  # the second token of the first answer ends it
    import torch

    (row,) = with_ids(torch.tensor([asked[0]]), max_new_tokens=2, do_sample=False, eos_token_id=None).tolist()
    monkeypatch.setattr(generating, "stop_token_ids", lambda path: read.append(path) or [row[-1]])
    cut = generating.generate(model, folder, asked, [0, 0, 0], 6, greedy, 3)
    assert (cut[0].tokens, cut[0].finish_reason) == (2, "stop")
    assert whole[0].text.startswith(cut[0].text)
    assert read == [folder]


@pytest.mark.long
def test_memory_does_not_grow_with_the_prompts(context, tmp_path):
    """Prompts are read, checked, answered, joined and counted as a stream."""
    import tracemalloc

    from cordee.compute.generating import Generated
    from eval.measuring import parts, prompts

    def peak(count):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps({"prompt": "word " * 100}) + "\n" for _ in range(count))
        tracemalloc.start()
        asked = prompts.choose(Source(path=Input(path)), None, context.note)
        asked, _ = prompts.checked(asked, [], context, may_drop=False)
        writer = parts.Writer(context.out, str(count), as_text=False, samples=2, seed=0)
        writer.write(asked, 300, lambda _, seeds: [Generated("x" * 400, 9, "stop") for _ in seeds], context, 0, 1)
        assert parts.tell(writer.file, {3}).answers == 2 * count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small = peak(2500)
    assert peak(5000) < small + 700_000  # of 3.2 MB of prompts and answers
