"""The shapes of rows: each of those that people have becomes the same messages, and what is none is told with hints."""

from pathlib import Path
from typing import Any

import pytest
from families import talk

from cordee.chat import formats
from cordee.chat.formats import Text, TextPair
from cordee.chat.problems import BadRowError
from cordee.chat.source import Source
from cordee.data.row import Broken, Row

HELLO = talk("hello", "German")
LONG = "Which language is this?"
SYSTEM = {"role": "system", "content": "Be brief."}


def chat(as_text: bool = False, **values: Any) -> Any:
    return formats.chat(values, as_text=as_text)


def pair(as_text: bool = False, **values: Any) -> Any:
    return formats.pair(values, as_text=as_text)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": HELLO},
        {"messages": '[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "German"}]'},
        {"messages": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "German"}]},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "German"}]},
        {"conversations": [{"from": "Human", "value": "hello"}, {"from": "bing", "value": "German"}]},
        {"conversations": HELLO},
        {"instruction": "hello", "output": "German"},
        {"instruction": "hello", "input": "", "output": "German", "text": "### hello ### German"},
        {"prompt": "hello", "completion": "German"},
        {"prompt": HELLO[:1], "completion": HELLO[1:]},
        {"prompt": HELLO[:1], "completion": "German"},
        {"prompt": HELLO[:1], "completion": HELLO[1], "label": True},
        {"prompt": '[\n {"role": "user", "content": "hello"}\n]', "completion": "German", "label": "true"},
    ],
)
def test_the_shapes_that_people_have_are_the_same_messages(row: dict[str, Any]) -> None:
    assert chat(**row)["messages"] == HELLO


def test_what_stands_beside_the_messages_stays() -> None:
    found = chat(conversations=[{"from": "human", "value": "a", "weight": 0}], tools=[{}], id=3)
    assert found == {"messages": [{"role": "user", "content": "a", "weight": 0}], "tools": [{}], "id": 3}


def test_alpacas_input_stands_below_its_instruction_and_its_history_before() -> None:
    found = chat(instruction="Translate.", input="hello", output="salut", history=[["a", "b"]], system="Be brief.")
    assert found["messages"] == [SYSTEM, *talk("a", "b"), *talk("Translate.\nhello", "salut")]


def test_a_system_column_is_the_first_message_unless_it_stands_there() -> None:
    assert chat(messages=HELLO, system="Be brief.")["messages"] == [SYSTEM, *HELLO]
    assert chat(messages=[SYSTEM, *HELLO], system="Be brief.")["messages"] == [SYSTEM, *HELLO]
    assert chat(messages=HELLO, system=" ")["messages"] == HELLO
    with pytest.raises(BadRowError, match="column 'system' is not what the messages begin with"):
        chat(messages=[SYSTEM, *HELLO], system="Be long.")


def test_calls_and_results_of_sharegpt_are_tool_messages() -> None:
    turns = [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 2, "y": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "Four."},
    ]
    roles = [message["role"] for message in chat(conversations=turns)["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    call = chat(conversations=turns)["messages"][1]["tool_calls"][0]
    assert call == {"type": "function", "function": {"name": "add", "arguments": {"x": 2, "y": 2}}}
    turns[1]["value"] = "add(2, 2)"
    with pytest.raises(BadRowError, match="the value of a turn from 'function_call' can't be read as JSON"):
        chat(conversations=turns)


def test_answers_within_a_prompt_carry_no_loss() -> None:
    found = chat(prompt=[*HELLO, {"role": "user", "content": "sure?"}], completion="yes")["messages"]
    assert [message.get("train") for message in found] == [None, False, None, None]


def test_strings_are_joined_as_they_stand_where_asked_and_texts_always() -> None:
    assert chat(as_text=True, prompt="hello ", completion="German") == Text("hello ", "German")
    assert chat(text="hello") == Text("", "hello")
    assert pair(as_text=True, prompt="a", chosen="b", rejected="c") == TextPair("a", "b", "c")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HELLO[:1], "chosen": HELLO[1:], "rejected": talk("", "no")[1:]},
        {"chosen": HELLO, "rejected": talk("hello", "no")},
        {"prompt": "hello", "chosen": "German", "rejected": "no"},
        {"prompt": "hello", "chosen": HELLO, "rejected": talk("hello", "no"), "messages": HELLO, "prompt_id": "1"},
        {"prompt": HELLO[:1], "chosen": "German", "rejected": "no"},
        {"prompt": "hello", "chosen": HELLO[1], "rejected": talk("", "no")[1]},
        {"prompt": "hello", "chosen": {"from": "gpt", "value": "German"}, "rejected": {"from": "gpt", "value": "no"}},
    ],
)
def test_the_shapes_of_pairs_are_one(row: dict[str, Any]) -> None:
    found = pair(**row)
    assert (found["prompt"], found["chosen"], found["rejected"]) == (HELLO[:1], HELLO[1:], talk("", "no")[1:])


def test_an_implicit_prompt_ends_with_what_is_not_the_assistants() -> None:
    shared = talk(
        "a",
        "b",
    )
    found = pair(chosen=[*shared, *talk("c", "d")], rejected=[*shared, *talk("c", "e")])
    assert found["prompt"] == [*shared, {"role": "user", "content": "c"}]
    found = pair(chosen=[*shared, *talk("c", "d")], rejected=[*shared, *talk("x", "e")])
    assert (found["prompt"], len(found["chosen"])) == (shared[:1], 3)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("Human: hi\n\nAssistant: Hello!", "Human: hi\n\nAssistant: No."), ("The sky is blue.", "The sky is green.")],
)
def test_texts_without_a_prompt_are_split_as_trl_does_it(chosen: str, rejected: str) -> None:
    from trl import extract_prompt

    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert pair(chosen=chosen, rejected=rejected) == TextPair(theirs["prompt"], theirs["chosen"], theirs["rejected"])


@pytest.mark.parametrize(
    ("row", "problem", "hint"),
    [
        ({"question": "a", "answer": "b"}, "can't be told what it is: its columns are 'question', 'answer'", "renames"),
        ({}, "its columns are none", "known are messages; conversations; instruction, output"),
        ({"chosen": "a", "rejected": "b"}, "is a preference pair", "posttrain.dpo trains on pairs"),
        ({"prompt": "a"}, "its columns are 'prompt'", "renames"),
        ({"prompt": "a", "completion": "b", "label": False}, "a completion that is labelled false", "ignore"),
        ({"instruction": 3, "output": "b"}, "instruction is no text", ""),
        ({"prompt": "", "completion": "b"}, "prompt is empty", ""),
        ({"prompt": [], "completion": "b"}, "prompt is empty", ""),
        ({"prompt": 3, "completion": "b"}, "prompt is no text and no list of messages", ""),
        ({"text": "  "}, "text is empty", ""),
        ({"text": 3}, "text is no text", ""),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "history is no list of pairs", ""),
        ({"instruction": "a", "output": "b", "history": 3}, "history is no list of pairs", ""),
        ({"prompt": "a", "completion": "b", "label": "False"}, "a completion that is labelled false", "ignore"),
        (
            {"prompt": HELLO[:1], "completion": HELLO},
            "completion begins with the prompt",
            "columns: {completion: messages}",
        ),
        ({"prompt": LONG, "completion": f"{LONG} German"}, "completion begins with the prompt", "ignore: [prompt]"),
        ({f"column {n}": n for n in range(50)}, "'column 11' and 38 more", "renames"),
        ({"messages": '[{"role": }]'}, "messages can't be read as JSON", ""),
    ],
)
def test_what_is_no_chat_is_told_with_what_is_known(row: dict[str, Any], problem: str, hint: str) -> None:
    with pytest.raises(BadRowError, match=problem) as caught:
        chat(**row)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": HELLO}, "is no preference pair but messages"),
        ({"chosen": "a"}, "can't be told what it is: its columns are 'chosen'"),
        ({"chosen": HELLO, "rejected": talk("other", "no")}, "begin with different turns, and there is no `prompt`"),
        ({"prompt": "x", "chosen": HELLO, "rejected": talk("hello", "no")}, "prompt is not what chosen and rejected"),
        ({"chosen": "a b", "rejected": "a b"}, "chosen and rejected are equal"),
        ({"chosen": "a", "rejected": "b"}, "share no prompt"),
        ({"prompt": LONG, "chosen": f"{LONG} German", "rejected": f" {LONG} no"}, "chosen begins with the prompt"),
    ],
)
def test_what_is_no_pair_is_told(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRowError, match=problem):
        pair(**row)


@pytest.mark.parametrize("answer", ['[{"name": "Ada"}]', "[{ is no JSON", '[{"role": 1}, 2]', f"Hello! {LONG}"])
def test_an_answer_in_json_is_an_answer_and_one_may_hold_its_prompt(answer: str) -> None:
    assert chat(prompt=LONG, completion=answer)["messages"][1]["content"] == answer
    assert pair(prompt=LONG, chosen=answer, rejected=f"{LONG} no")["chosen"][0]["content"] == answer
    assert pair(prompt="Hello", chosen="Hello!", rejected="Hello you")["chosen"][0]["content"] == "Hello!"


def test_columns_are_renamed_and_nulls_are_none() -> None:
    source = Source.model_validate({"path": "a", "columns": {"q": "prompt", "a": "completion"}, "ignore": ["id"]})
    row = Row(Path("a"), 1, {"q": "hello", "a": "German", "id": 3, "text": None})
    assert formats.columns_of(row, source) == {"prompt": "hello", "completion": "German"}
    with pytest.raises(BadRowError, match="has no column 'q', which `columns` renames"):
        formats.columns_of(Row(Path("a"), 1, {"question": "x", "a": "b"}), source)
    with pytest.raises(BadRowError, match="renames 'q' to 'prompt', and there is such a column"):
        formats.columns_of(Row(Path("a"), 1, {"q": "x", "a": "b", "prompt": "c"}), source)
    with pytest.raises(BadRowError, match="no JSON object"):
        formats.columns_of(Row(Path("a"), 1, Broken("no JSON object", "{")), source)


@pytest.mark.parametrize(
    ("row", "asked", "answer"),
    [
        ({"prompt": "hello", "answer": "German"}, HELLO[:1], "German"),
        ({"prompt": "hello", "system": "Be brief."}, [{"role": "system", "content": "Be brief."}, *HELLO[:1]], None),
        ({"messages": [*HELLO, *HELLO]}, [*HELLO, *HELLO[:1]], "German"),
        ({"messages": HELLO[:1]}, HELLO[:1], None),
        ({"instruction": "a", "input": "b", "output": "c"}, [{"role": "user", "content": "a\nb"}], "c"),
        ({"prompt": "hello", "completion": "German"}, HELLO[:1], "German"),
        ({"prompt": "hello", "chosen": HELLO, "rejected": HELLO[:1]}, HELLO[:1], None),
        ({"prompt": "hello", "messages": HELLO, "text": "x"}, HELLO[:1], None),
    ],
)
def test_a_question_is_asked_with_all_that_stands_before_its_answer(row: Any, asked: Any, answer: Any) -> None:
    values, found = formats.question(row)
    assert [{key: one[key] for key in ("role", "content")} for one in values["messages"]] == asked
    assert "system" not in values
    assert found == answer


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "input": "b"}, "has `input` beside the prompt, which would not be asked"),
        ({"text": "a"}, "is a text, and a question is needed"),
    ],
)
def test_what_would_not_be_asked_is_refused(row: Any, problem: str) -> None:
    with pytest.raises(BadRowError, match=problem):
        formats.question(row)
