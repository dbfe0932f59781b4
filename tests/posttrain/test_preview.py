"""`cordee data` shows what a training would see: of any rows, models and adapters, with the keys that decide."""

import io
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import architectures
import pytest
from families import talk, write
from rich.console import Console
from tokenizers import AddedToken
from transformers import AutoTokenizer

from cordee import preview_keys
from cordee.chat.source import Source
from cordee.chat.tokenized import tokenize
from cordee.compute import preview
from cordee.config import Input
from cordee.errors import UserError
from cordee.stage import Context

ROW = {"messages": talk("hello", "German")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make_family(tmp_path_factory.mktemp("model") / "m", "qwen3")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.trained_adapter(model, tmp_path_factory.mktemp("adapter") / "a")


def seen(file: Path, model: Path, *keys: str, none_left: bool = False, **console: Any) -> str:
    out = Console(file=io.StringIO(), **{"width": 120, **console})
    ends = pytest.raises(UserError, match=r"has no row that can be trained on$") if none_left else nullcontext()
    with ends:
        preview.run(preview_keys.read(file, keys), model, out)
    return str(out.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("max_length=abc", "max_length: Input should be a valid integer, .*, not 'abc'"),
        ("max_length=0", "max_length: Input should be greater than or equal to 1, not 0"),
        ("limit=0", "limit: Input should be greater than or equal to 1, not 0"),
        ("rows=-1", "rows: Input should be greater than or equal to 1, not -1"),
        ("pairs=maybe", "pairs: .*, not 'maybe'; write true or false"),
        ("rows=[1", r"rows: '\[1' is no YAML value; a text with such signs is quoted"),
        ("split", "'split' is no key=value$"),
        ("max_lenght=1", "max_lenght: unknown key; did you mean 'max_length'"),
        ("overlong=dorp", "overlong: .*'error', 'drop', 'truncate' or 'cut', not 'dorp'"),
        ("limit.x=1", "limit: Input should be a valid integer, not {'x': 1}"),
        ("weight=2", "weight: is no key of this command"),
        ("chat_template=qwen33", "chat_template: no file and no template 'qwen33'; did you mean 'qwen3'"),
        ("chat_template=./gone.jinja", "chat_template: there is no such file or folder: gone.jinja"),
    ],
)
def test_a_key_that_is_wrong_is_one_line_that_names_it(tmp_path: Path, given: str, line: str) -> None:
    with pytest.raises(UserError, match=f"^command line: {line}"):
        preview_keys.read(write(tmp_path / "a.jsonl", ROW), [given])


def test_a_key_within_another_is_set_as_in_a_recipe(tmp_path: Path) -> None:
    settings = preview_keys.read(write(tmp_path / "a.jsonl", ROW), ["columns.question=prompt", "rows=null"])
    assert (settings.columns, settings.rows) == ({"question": "prompt"}, None)


def test_most_of_the_first_rows_decide_what_all_are(model: Path, tmp_path: Path) -> None:
    pair = {"prompt": "Who?", "chosen": "I do", "rejected": "You do"}
    told = seen(write(tmp_path / "pairs.jsonl", {"x": 1}, pair, pair, ROW, pair), model)
    assert "preference pair 3, unknown 1, messages 1; read as pairs, unless pairs=false\n" in told
    assert "can't be told what it is: its columns are 'x' (row 1)" in told
    assert "is no preference pair but messages (row 4)" in told
    assert "row 2: chosen\n" in told
    told = seen(write(tmp_path / "chats.jsonl", pair, ROW, ROW, {"x": 1}), model)
    assert "is a preference pair, and this stage trains on chats (row 1)" in told


def test_both_sides_of_a_pair_are_shown_with_what_is_compared(model: Path, tmp_path: Path) -> None:
    """Swapped columns, or a rejected answer that is a bracket, are seen."""
    told = seen(write(tmp_path / "a.jsonl", {"prompt": "Who?", "chosen": "I do", "rejected": "["}), model)
    shown = dict(re.findall(r"^row 1: (\w+)\n(.*?)\n(?=\nrow|\Z)", told, re.MULTILINE | re.DOTALL))
    assert list(shown) == ["prompt", "chosen", "rejected"]
    assert "Who?" in shown["prompt"]
    assert "⟦" not in shown["prompt"]
    for side, said in (("chosen", "I do"), ("rejected", "[")):
        assert re.fullmatch(rf"⟦<think>\s*</think>\s*{re.escape(said)}<\|im_end\|>\s*⟧", shown[side])
    assert told.count("Who?") == 1


@pytest.mark.parametrize("of", ["pairs", "chats"])
def test_tokens_are_counted_as_a_training_counts_them(of: Any, model: Path, tmp_path: Path) -> None:
    """Of a pair the prompt twice, before either answer, and each answer once."""
    pair = {"prompt": "Who is there? " * 9, "chosen": "I do", "rejected": "You do, and you, and you"}
    file = write(tmp_path / "a.jsonl", *([pair, pair] if of == "pairs" else [ROW, ROW, ROW]))
    (tmp_path / "logs").mkdir()
    context = Context(out=tmp_path / "out", seed=5, events=tmp_path / "logs" / "events.jsonl")
    settings = preview_keys.read(file, [])
    encoder, _ = preview.open_encoder(model, settings)
    source = Source(path=Input(file))
    report = tokenize(of, encoder.tokenizer, source, encoder.rules, context, tmp_path / "cache").report
    told = seen(file, model)
    assert f"  tokens   {report['tokens']:,}; " in told
    assert ("a pair is two: the prompt with either answer" in told) == (of == "pairs")


def test_what_a_person_would_want_to_know_is_noted(model: Path, tmp_path: Path) -> None:
    pair = {"prompt": "Who?", "chosen": "I do", "rejected": "nan"}
    other = {"prompt": "Who?", "chosen": "nan", "rejected": "I do"}
    told = seen(write(tmp_path / "pairs.jsonl", pair, other, {**pair, "prompt": "And?"}, pair), model)
    assert "note     1 pair stands there both ways round: the answer that one row chooses another row rejects\n" in told
    assert "note     1 row stands there twice: posttrain.data removes duplicates\n" in told
    assert "note     4 answers are only `nan`: is a value missing there?\n" in told
    asking = {"messages": [*talk("hi", "German"), {"role": "user", "content": "and?"}]}
    told = seen(write(tmp_path / "chats.jsonl", asking, ROW, ROW, ROW, {"messages": talk("why", " N/A\n")}), model)
    assert "note     1 of 5 chats ends with the user, whose last turn is never trained\n" in told
    assert "note     1 row stands there several times, 3 in all: posttrain.data removes duplicates\n" in told
    assert "note     1 answer is only `N/A`: is a value missing there?\n" in told
    assert "note" not in seen(write(tmp_path / "good.jsonl", ROW, {"messages": talk("why", "so None")}), model)


def test_rows_of_other_columns_that_are_unknown_are_one_line(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ROW, {"x": 1, "y": 2}, {"x": 1}, {"x": 1}, {"z": 1})
    (line,) = (line for line in seen(file, model).splitlines() if "refused" in line)
    assert (
        "4 rows: can't be told what it is: its columns are 'x', 'y'; those of other rows differ (rows 2, 3, 4" in line
    )


def test_an_adapter_is_looked_at_with_its_base(model: Path, adapter: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ROW)
    told = seen(file, adapter)
    assert f"note     {adapter} is an adapter on {model}" in told
    assert told.replace(f"  note     {adapter} is an adapter on {model}\n", "") == seen(file, model)
    alone = shutil.copytree(adapter, tmp_path / "alone")
    config = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone"}))
    with pytest.raises(UserError, match=r"model: its base 'gone' is no model folder here; .*`base:`"):
        seen(file, alone)
    assert "is an adapter on" in seen(file, alone, f"base={model}")
    with pytest.raises(UserError, match="base: is for an adapter"):
        seen(file, model, f"base={model}")


def test_an_adapters_own_tokenizer_counts_and_the_rows_that_it_holds(model: Path, tmp_path: Path) -> None:
    """Rows of the embedding for the tokens that it was trained with, and no more."""
    size = len(AutoTokenizer.from_pretrained(model))
    trained = architectures.trained_adapter(model, tmp_path / "trained", trainable_token_indices=[5])
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken("<one>", special=True), AddedToken("<two>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<one>{% endfor %}"
    tokenizer.save_pretrained(trained)
    file = write(tmp_path / "a.jsonl", ROW)
    beyond = f"a token id beyond the {size} rows of the model's embedding: is it its tokenizer? (row 1: id {size})"
    assert beyond in seen(file, trained, none_left=True)
    config = json.loads((trained / "adapter_config.json").read_text())
    (trained / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": [size]}))
    assert "token id beyond" not in seen(file, trained)


def test_ids_beyond_the_models_embedding_are_left_out_as_in_a_training(model: Path, tmp_path: Path) -> None:
    size = len(AutoTokenizer.from_pretrained(model))
    other = shutil.copytree(model, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken("<new>", special=True)])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<new>")
    tokenizer.save_pretrained(other)
    file = write(tmp_path / "a.jsonl", ROW)
    assert f"a token id beyond the {size} rows of the model's embedding" in seen(file, other, none_left=True)
    assert "token id beyond" not in seen(file, other, "added_tokens=[<new>]")


def test_the_keys_of_a_training_do_what_they_do_there(model: Path, tmp_path: Path) -> None:
    thoughts = "<think>\nwhy\n</think>\n\n"
    file = write(tmp_path / "a.jsonl", {"messages": talk("hello", f"{thoughts}German", "a " * 20, f"{thoughts}Swiss")})
    assert "1 answers that the chat template renders differently when messages follow: each is trained" in seen(
        file, model
    )
    assert "when messages follow, which are not trained" in seen(file, model, "earlier_answers=skip")
    long = write(tmp_path / "long.jsonl", {"messages": talk("hello", "German", "b " * 200, "Swiss")})
    assert "refused  1 row: longer" in seen(long, model, "max_length=100", none_left=True)
    assert "left out 1 row: longer than max_length=100" in seen(
        long, model, "max_length=100", "overlong=drop", none_left=True
    )
    assert "shortened" in seen(long, model, "max_length=100", "overlong=truncate", "chat_template=chatml")
    assert "<|im_start|>assistant" in seen(long, model, "chat_template=chatml")
    assert "padding token: '<|im_start|>', as asked for" in seen(long, model, "pad_token=<|im_start|>")
    told = seen(long, model, "added_tokens=[<new>]", "chat_template=chatml")
    assert "added tokens: '<new>'" in told


def test_a_narrow_terminal_keeps_names_apart_and_a_pipe_keeps_lines_whole(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"messages": []}, ROW)
    problem = "1 row: messages is empty (row 1); `bad_rows: drop` leaves them out"
    assert f"  refused  {problem}\n" in seen(file, model, width=40)
    shown = seen(file, model, width=40, force_terminal=True, color_system=None).splitlines()
    first = next(at for at, line in enumerate(shown) if line.startswith("  refused"))
    assert shown[first + 1].startswith(" " * 10)
    assert all(len(line) <= 40 for line in shown[first : first + 3])
