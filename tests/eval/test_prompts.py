"""What is asked in a generation: prompts from files, how many, and keys that are wrong."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from generation import answers, config, context_in, written

from cordee.chat.source import Source
from cordee.config import Input
from cordee.errors import UserError
from eval import generate


@pytest.fixture
def context(tmp_path):
    return context_in(tmp_path)


@pytest.fixture
def first(checkpoints):
    return {"first": checkpoints["first"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 1: no JSON object"),
        ('{"question": "x", "answer": "y"}', "row 1: can't be told what it is: its columns are 'question', 'answer'"),
        ('{"prompt": 5}', "row 1: prompt is no text and no list of messages"),
        ('{"prompt": "<|assistant_start|>deu"}', r"row 1: models\.first: a text spells out .*<\|assistant_start\|>"),
        ('{"prompt": [{"role": "user", "content": "x", "nmae": "y"}]}', r"does not read a message's 'nmae'"),
        ('{"prompt": "x", "tools": [{"name": "add"}]}', "has tools, which the chat template does not read"),
        ("", "holds no prompt"),
    ],
)
def test_prompts_that_are_none_are_one_line(line, message, first, context, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=message):
        generate.run(config(first, path), context)


def test_what_can_not_be_asked_is_told_at_once_or_left_out_for_all_models(checkpoints, context, tmp_path):
    rows = [{"prompt": "deu"}, {"prompt": 5}, {"prompt": "Menschen " * 100}, {"prompt": "x"}, {"prompt": "fra"}]
    path = written(tmp_path / "p.jsonl", rows)
    keys = {"max_length": 64, "max_prompts": None}
    with pytest.raises(UserError) as caught:
        generate.run(config(checkpoints, path, **keys), context)
    assert "p.jsonl: 2 of 5 rows: prompt is no text and no list of messages (row 2)" in str(caught.value)
    assert "models.first: longer than 58 tokens: max_length less max_tokens (row 3: " in str(caught.value)
    assert "`bad_rows: drop` leaves such rows out" in str(caught.value)
    assert not (context.out / "answers").exists()
    told = generate.run(config(checkpoints, path, bad_rows="drop", **keys), context)
    assert (told["prompts"], told["rows"]) == (3, 6)
    assert [row["prompt_id"] for row in answers(context, "second")] == [0, 3, 4]
    left_out = json.loads((context.out / "prompts.json").read_text())["left_out"]
    assert [(kind["rows"], kind["first"][0]["row"]) for kind in left_out] == [(1, 2), (1, 3)]
    path = written(tmp_path / "none.jsonl", rows[1:2])
    with pytest.raises(UserError, match="no prompt of 1 is left: 1 prompt is no text"):
        generate.run(config(checkpoints, path, bad_rows="drop"), context)


def test_prompts_are_read_from_any_data_file_or_folder_with_their_columns_renamed(tmp_path):
    from eval.measuring import prompts

    folder = tmp_path / "data"
    folder.mkdir()
    table = pa.table({"question": ["2 + 2?"], "answer": ["4"], "kind": ["sum"], "note": [None]})
    for split in ("train", "test"):
        pq.write_table(table, folder / f"{split}.parquet")

    def read(path, columns, split=None):
        return list(prompts.choose(Source(path=Input(path), columns=columns, split=split), None, print))

    for one in (folder / "test.parquet", folder):
        (prompt,) = read(one, {"question": "prompt"}, None if one.is_file() else "test")
        assert (prompt.shown, prompt.reference, prompt.record.values["kind"]) == ("2 + 2?", "4", "sum")
        assert prompt.messages == [{"role": "user", "content": "2 + 2?"}]
    with pytest.raises(UserError, match=r"row 1: has no column 'questoin', .*; did you mean 'question'\?"):
        read(folder / "test.parquet", {"questoin": "prompt"})
    lines = [{"prompt": "one\u2028two\u0085three", "answer": ["a", "b"]}, {"prompt": "x", "answer": 5}]
    both = read(written(tmp_path / "p.jsonl", lines), {})
    assert [(prompt.shown, prompt.reference) for prompt in both] == [(lines[0]["prompt"], None), ("x", "5")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"top_n": 1}}, r"sampling\.top_n: unknown key; did you mean 'top_p'\?"),
        ({"sampling": {"max_tokens": 5}}, r"sampling\.max_tokens: unknown key; write max_tokens beside sampling"),
        ({"temperature": 0.5}, r"temperature: unknown key; write sampling: \{temperature: …\}"),
        ({"sampling": {"top_p": 0.9}}, r"sampling\.top_p: has no effect at temperature 0, which is greedy: 0\.9"),
        ({"n": 2}, r"n: 2 answers to a prompt are all the same at temperature 0"),
        ({"sampling": {"min_tokens": 7}}, r"sampling\.min_tokens: 7 tokens are more than max_tokens=6"),
        ({"sampling": {"presence_penalty": 1}}, r"sampling\.presence_penalty: transformers has no such penalty"),
        ({"sampling": {"temperature": 3}}, r"sampling\.temperature: Input should be less than or equal to 2"),
        ({"sampling": {"stop": ["a", ""]}}, r"sampling\.stop.*: String should have at least 1 character"),
    ],
)
def test_a_key_that_is_wrong_is_told_by_the_plan(changes, message):
    from cordee import recipe

    keys = {"models": {"m": "m"}, "prompts": "p", "max_tokens": 6, "engine": "transformers", **changes}
    with pytest.raises(UserError, match=message):
        recipe.validate(generate.Config, keys, "r.yaml", "stages.s")


@pytest.mark.parametrize("count", [1, 2, 5, 7, 12, 20])
def test_prompts_are_spread_over_languages_and_passages_whatever_their_order(count):
    from eval.measuring import prompts

    by_article = [(tag, article) for article in range(4) for tag in ("de", "fr", "it")]
    for rows in (by_article, sorted(by_article)):
        places = prompts.spread([tag for tag, _ in rows], count)
        assert places == sorted(set(places))
        assert len(places) == min(count, len(rows))
        counts = [sum(rows[at][0] == tag for at in places) for tag in ("de", "fr", "it")]
        assert max(counts) - min(counts) <= 1
        if count == 5:
            assert len({rows[at][1] for at in places}) > 2
