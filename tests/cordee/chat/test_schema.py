"""What a row says: each column and message key is used, dropped as null, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import ADD, CALL, TOOL_TALK, parts, source, talk, tokenizer, write

from cordee.chat import base, schema
from cordee.chat.problems import BadRowError
from cordee.chat.schema import Record
from cordee.chat.templates import Template
from cordee.chat.values import without_nulls
from cordee.data import rows as data

QWEN = Template(tokenizer(source("qwen3")))
PLAIN = Template(tokenizer(base.TEMPLATE.read_text(encoding="utf-8")))
HELLO = talk("hello", "German")


def record(**values: Any) -> Record:
    return Record(Path("chats.jsonl"), 4, values)


def read(file: Path) -> list[Record]:
    """The rows of a file, null columns and all."""
    return [Record(file, row.number, dict(row.values)) for batch in data.batches([file]) for row in batch]


def pair(**values: Any) -> Record:
    return record(**{"prompt": HELLO[:1], "chosen": talk("", "yes")[1:], "rejected": talk("", "no")[1:], **values})


# --- nulls ----------------------------------------------------------------------------------------------------


def test_nulls_that_parquet_fills_in_are_no_values(tmp_path: Path) -> None:
    """A struct of Parquet has the keys of all rows: where a row had none, they are null at every depth."""
    rows = [{"messages": TOOL_TALK, "tools": [ADD]}, {"messages": HELLO, "tools": None}]
    rows[0]["messages"] = [*rows[0]["messages"], {"role": "user", "content": "?", "tool_calls": None}]
    filled, plain = read(write(tmp_path / "a.parquet", *rows)), read(write(tmp_path / "a.jsonl", *rows))
    assert filled[1].values["messages"][1]["tool_calls"] is None
    for one, other in zip(filled, plain, strict=True):
        ours, theirs = schema.chat(one, QWEN), schema.chat(other, QWEN)
        assert (ours.messages, ours.options) == (theirs.messages, theirs.options)
    assert schema.chat(filled[1], QWEN).messages == HELLO


def test_nulls_go_as_trl_takes_them_out() -> None:
    from trl.trainer.utils import remove_none_values

    value = {"a": {"b": None, "c": [1, None, {"d": None, "e": 2}]}, "f": None, "g": [[{"h": None}]], "i": False}
    assert without_nulls(value) == remove_none_values(value)


# --- tools and other columns of the template ------------------------------------------------------------------


@pytest.mark.parametrize("tools", [[ADD], json.dumps([ADD]), [json.dumps(ADD)]])
def test_tools_are_a_list_or_json_text(tools: Any) -> None:
    assert schema.chat(record(messages=HELLO, tools=tools), QWEN).options == {"tools": [ADD]}
    assert schema.pair(pair(tools=tools), QWEN).options == {"tools": [ADD]}


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_no_option(tools: Any) -> None:
    assert schema.chat(record(messages=HELLO, tools=tools), PLAIN).options == {}


def test_chat_template_kwargs_are_given_to_the_template() -> None:
    row = record(messages=HELLO, chat_template_kwargs={"enable_thinking": False, "other": None})
    assert schema.chat(row, QWEN).options == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"tools": [ADD]}, "has tools, which the chat template does not read"),
        ({"documents": [{"title": "a", "text": "b"}]}, "has documents, which the chat template does not read"),
        ({"tools": "[{"}, "tools can't be read as JSON"),
        ({"tools": {"name": "add"}}, "tools is no list of mappings"),
        ({"tools": [["add"]]}, "tools is no list of mappings"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "takes no 'enable_thinking'"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "takes no 'add_generation_prompt'"),
        ({"chat_template_kwargs": ["x"]}, "chat_template_kwargs is no mapping"),
        ({"system": "Be brief."}, "column 'system' is not read"),
        ({"images": ["a.png"]}, "column 'images' is not read"),
        ({"functions": [{"name": "add"}]}, "column 'functions' is not read"),
        ({"weight": 0}, "column 'weight' is not read"),
        ({"weight": 0.5}, "column 'weight' is not read"),
        ({"train": False}, "column 'train' is not read"),
    ],
)
def test_a_column_that_would_change_what_is_trained_is_refused_alike_in_sft_and_dpo(
    columns: dict[str, Any], problem: str
) -> None:
    for read_row, row in ((schema.chat, record(messages=HELLO, **columns)), (schema.pair, pair(**columns))):
        with pytest.raises(BadRowError, match=problem):
            read_row(row, PLAIN)


def test_a_column_that_bears_the_name_of_a_templates_variable_is_refused() -> None:
    with pytest.raises(BadRowError, match="column 'enable_thinking' is a variable of the chat template") as caught:
        schema.chat(record(messages=HELLO, enable_thinking=False), QWEN)
    assert caught.value.hint == "write it as chat_template_kwargs: {enable_thinking: …}"


def test_columns_that_change_nothing_are_kept_out_and_told() -> None:
    row = record(messages=HELLO, id=3, source="web", language=None, weight=1, train=True, system="", images=[])
    schema.chat(row, PLAIN)
    told = schema.other_columns(row.values, ("messages",), ["id"])
    assert told == {"images", "source", "system", "train", "weight"}


def test_what_is_ignored_by_name_is_left_out() -> None:
    messages = [{**message, "country": "CH"} for message in HELLO]
    chat = schema.chat(record(messages=messages, system="Be brief."), PLAIN, ("system", "country"))
    assert chat.messages == HELLO


# --- keys of messages -----------------------------------------------------------------------------------------


def test_a_key_that_the_template_does_not_read_is_refused_by_name() -> None:
    messages = talk("hello", "German", reasoning="It ends with -schen.")
    for template, hint in ((QWEN, "rename it to 'reasoning_content', or leave it out"), (PLAIN, "leave it out")):
        with pytest.raises(BadRowError, match="does not read a message's 'reasoning'") as caught:
            schema.chat(record(messages=messages), template)
        assert caught.value.hint.startswith(hint)
        with pytest.raises(BadRowError, match="does not read a message's 'reasoning'"):
            schema.pair(pair(chosen=messages[1:]), template)


def test_a_key_that_holds_nothing_is_no_key() -> None:
    chat = schema.chat(record(messages=talk("hello", "German", tool_calls=[], reasoning="", refusal=None)), PLAIN)
    assert "tool_calls" not in chat.messages[1]


def test_a_template_that_writes_whole_messages_reads_every_key() -> None:
    whole = Template(tokenizer("{% for m in messages %}{{ m | tojson }}</s>{% endfor %}"))
    assert schema.chat(record(messages=talk("hello", "German", mood="good")), whole).messages[1]["mood"] == "good"


def test_a_tools_message_may_say_to_which_call_it_belongs() -> None:
    messages = [dict(message) for message in TOOL_TALK]
    messages[2] |= {"tool_call_id": "call_1", "name": "add"}
    assert schema.chat(record(messages=messages), QWEN).messages[2]["tool_call_id"] == "call_1"


def test_arguments_as_json_text_are_what_they_spell() -> None:
    """OpenAI's format has them as text; Qwen's template would quote the text a second time."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": null}'}}
    chat = schema.chat(record(messages=[HELLO[0], {"role": "assistant", "tool_calls": [call]}]), QWEN)
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "y": None}


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "user"}, "a message has no content"),
        ({"role": "user", "content": 3}, "its content is no text"),
        ({"role": "user", "content": [{"type": "image"}]}, "its content holds something else than text"),
        ({"content": "hello"}, "a message has no role"),
        ("hello", "a message has no role"),
        ({"role": "user", "content": "a <s> b"}, "spells out the special token '<s>'"),
        ({"role": "user", "content": [{"type": "text", "text": "</s>"}]}, "spells out the special token '</s>'"),
        ({"role": "user", "content": parts("</|s>")[0]["content"]}, "spells out the special token '</s>'"),
        ({"role": "user", "content": [{"type": "text"}]}, "a part of its content has no text"),
        ({"role": "user", "content": "a \ud83d b"}, "a text holds half of a surrogate pair"),
        ({"role": "assistant", "tool_calls": "add"}, "tool_calls is no list of calls"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, "a tool call has no name"),
        ({"role": "assistant", "tool_calls": [{"type": "function", "function": None}]}, "a tool call has no name"),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "a", "arguments": "{"}}]},
            "arguments can't",
        ),
        ({"role": "user", "content": "a", "weight": 0.5}, "a message's `weight` is neither 0 nor 1"),
        ({"role": "user", "content": "a", "train": "yes"}, "a message's `train` is neither 0 nor 1"),
        ({"role": "user", "content": "a", "train": True, "weight": 0}, "say different things"),
    ],
)
def test_a_message_that_can_not_be_used_is_refused(message: Any, problem: str) -> None:
    with pytest.raises(BadRowError, match=problem):
        schema.chat(record(messages=[message, HELLO[1]]), QWEN)
    with pytest.raises(BadRowError, match=problem):
        schema.pair(pair(prompt=[message, *HELLO, HELLO[0]]), QWEN)


def test_lists_of_text_parts_are_given_as_they_are_to_a_template_that_reads_them_and_joined_to_others() -> None:
    split = parts("a| b", "c|d")
    for name, messages in (("qwen3_vl", split), ("llama3", talk("a b", "cd")), ("llava_next", parts("a b", "cd"))):
        template = Template(tokenizer(source(name)))
        assert schema.chat(record(messages=split), template).messages == messages
        assert schema.pair(pair(prompt=messages[:1], chosen=split[1:]), template).chosen == messages[1:]


# --- which answers train --------------------------------------------------------------------------------------


def test_train_and_weight_say_which_answers_carry_loss() -> None:
    messages = [*talk("a", "b", train=False), *talk("c", "d", weight=0), *talk("e", "f", weight=1.0), *talk("g", "h")]
    chat = schema.chat(record(messages=messages), QWEN)
    assert chat.trains == (False, False, False, False, False, True, False, True)
    assert all(set(message) == {"role", "content"} for message in chat.messages)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages is empty"),
        ("hello", "messages is no list of messages"),
        ([{"role": "user", "content": "hello"}], "no assistant turn"),
        ([{"role": "human", "content": "hello"}, {"role": "gpt", "content": "yes"}], "knows no role 'human'"),
        (talk("hello", "  "), "an answer has no content"),
        (talk("hello", "yes", train=False), "every answer is marked `train: false`"),
        (
            [{"role": "user", "content": "a", "train": True}, HELLO[1]],
            "a message of the user is marked to be trained on",
        ),
    ],
)
def test_a_chat_with_nothing_to_train_on_is_refused(messages: Any, problem: str) -> None:
    with pytest.raises(BadRowError, match=problem):
        schema.chat(record(messages=messages), PLAIN)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"prompt": HELLO}, "last message is the assistant's"),
        ({"chosen": HELLO[:1]}, "chosen ends with 'user'"),
        ({"rejected": talk("", "yes")[1:]}, "chosen and rejected are equal"),
        ({"chosen": [*HELLO[:1], *talk("", "yes")[1:]]}, "chosen begins with the prompt"),
        ({"rejected": talk("", "no", train=False)[1:]}, "rejected is marked `train: false`"),
        ({"rejected": "no"}, "rejected is no list of messages"),
        ({"rejected": talk("", "  ")[1:]}, "an answer has no content"),
    ],
)
def test_a_pair_with_nothing_to_prefer_is_refused(columns: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRowError, match=problem):
        schema.pair(pair(**columns), PLAIN)
