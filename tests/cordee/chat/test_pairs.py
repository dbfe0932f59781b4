"""Chats and pairs in tokens: what is refused, with how many rows, and that TRL would have made the same."""

from pathlib import Path
from typing import Any

import encoding
import pytest
from families import ADD, source, talk, tokenizer, write

from cordee.chat import conversations
from cordee.chat.source import Limits
from cordee.chat.templates import Template
from cordee.errors import UserError

QWEN = Template(tokenizer(source("qwen2_5")))
LIMITS = Limits(max_length=1024, positions=2048, vocab_size=100_000)
HELLO = talk("hello", "German")


def preference(**columns: Any) -> dict[str, Any]:
    return {"prompt": HELLO[:1], "chosen": talk("", "yes")[1:], "rejected": talk("", "no no")[1:], **columns}


@pytest.mark.parametrize("read", [encoding.chats, encoding.pairs])
@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (Limits(100, 1024, 100_000), "longer than max_length=100 tokens"),
        (Limits(512, 100, 100_000), "longer than the model's 100 positions"),
        (Limits(512, 1024, 300), "a token id beyond the 300 rows of the model's embedding"),
    ],
)
def test_rows_that_do_not_fit_are_counted_and_the_first_three_named(
    tmp_path: Path, read: Any, limits: Limits, problem: str
) -> None:
    rows = [preference(messages=HELLO), *(preference(prompt=talk("a " * 99), messages=talk("a " * 99, "b")),) * 5]
    file = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(UserError, match=problem) as caught:
        read(file, QWEN, limits, print)
    first, count = (1, 6) if limits.vocab_size == 300 else (2, 5)
    assert str(caught.value).startswith(f"{file}: {count} of 6 rows (rows {first}: ")
    assert f" and {count - 3} more): " in str(caught.value)


def test_all_kinds_of_problems_are_told_at_once(tmp_path: Path) -> None:
    rows = [{"messages": HELLO}, {"messages": []}, {"messages": talk("a " * 2000, "b")}, {"message": HELLO}]
    with pytest.raises(UserError) as caught:
        encoding.chats(write(tmp_path / "a.jsonl", *rows), QWEN, LIMITS, print)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'a.jsonl'}: 3 of 4 rows: messages is empty (row 2); can't be told what it is")
    assert "its columns are 'message' (row 4; known are messages; conversations;" in line
    assert "longer than max_length=1024 tokens (row 3: " in line


def test_columns_that_are_kept_out_are_told_once(tmp_path: Path) -> None:
    notes: list[str] = []
    file = write(tmp_path / "a.jsonl", *({"messages": HELLO, "kind": "x", "id": n} for n in range(3)))
    assert len(encoding.chats(file, QWEN, LIMITS, notes.append)) == 3
    assert notes == ["columns that are kept out: id, kind"]


PLAIN = ["qwen2_5", "qwen3", "llama3_1", "gemma3", "deepseek_r1_distill", "mistral", "phi3"]


@pytest.mark.parametrize(
    ("name", "tools"),
    [*((name, None) for name in PLAIN), *((name, [ADD]) for name in ("qwen2_5", "qwen3", "llama3_1", "mistral"))],
)
def test_a_pair_is_tokenized_as_trl_does_it(tmp_path: Path, name: str, tools: Any) -> None:
    """Its `DPOTrainer` renders prompt and both sides with the row's tools, and cuts where all three still agree."""
    from trl.data_utils import _tokenize, common_prefix_length

    template, notes = Template(tokenizer(source(name))), []
    row = preference(**({"tools": tools} if tools else {}))
    (pair,) = encoding.pairs(write(tmp_path / "pairs.jsonl", row), template, LIMITS, notes.append)
    asked = _tokenize(template.tokenizer, row["prompt"], add_generation_prompt=True, tools=tools)["input_ids"]
    sides = [
        _tokenize(template.tokenizer, row["prompt"] + row[side], tools=tools)["input_ids"]
        for side in ("chosen", "rejected")
    ]
    length = min(common_prefix_length(asked, side) for side in sides)
    assert (pair.prompt, pair.chosen, pair.rejected) == (asked[:length], sides[0][length:], sides[1][length:])
    assert bool(notes) == (name == "deepseek_r1_distill")
    assert pair.tokens == len(sides[0]) + len(sides[1])
    if tools:
        assert "Adds two numbers" in template.tokenizer.decode(pair.prompt)


def test_the_first_rows_of_chats_or_pairs_are_read_without_what_is_not_rendered(tmp_path: Path) -> None:
    """Nothing is trained on them, so that what would be refused for training is left out."""
    messages = [*talk("hello"), {**HELLO[1], "country": "CH", "train": False}]
    rows = [{"messages": messages, "functions": "x"}, {"prompt": HELLO[:1], "chosen": messages[1:]}, {"x": 1}]
    file = write(tmp_path / "rows.jsonl", *rows)
    found = conversations.first(file, 2, QWEN, LIMITS)
    theirs = QWEN.tokenizer.apply_chat_template(HELLO, tokenize=True, return_dict=True)["input_ids"]
    assert [(chat.messages, ids) for chat, ids in found] == [(HELLO, theirs)] * 2
    with pytest.raises(UserError, match="row 3: can't be told what it is: its columns are 'x'"):
        conversations.first(file, 3, QWEN, LIMITS)
    with pytest.raises(UserError, match="longer than the model's 9 positions"):
        conversations.first(file, 1, QWEN, Limits(None, 9, 1000))


def test_the_first_rows_say_why_they_are_no_chats(tmp_path: Path) -> None:
    """Of pairs the rejected answer tells the prompt, which it shares with the chosen one."""
    for row, problem in (
        ({"chosen": "Who? I do.", "rejected": "Who? You do."}, "is a text, and a chat is needed"),
        ({"chosen": "Who?", "rejected": "I do."}, "chosen and rejected share no prompt"),
        ({"chosen": "Who? I do."}, "can't be told what it is: its columns are 'chosen'"),
    ):
        with pytest.raises(UserError, match=f"row 1: {problem}"):
            conversations.first(write(tmp_path / "rows.jsonl", row), 1, QWEN, LIMITS)
    shared = {"chosen": HELLO, "rejected": [HELLO[0], {"role": "assistant", "content": "no"}]}
    ((chat, _),) = conversations.first(write(tmp_path / "rows.jsonl", shared), 1, QWEN, LIMITS)
    assert chat.messages == HELLO


@pytest.mark.parametrize(
    ("read", "row"),
    [
        (encoding.chats, {"messages": talk("hello", "<think>\nIt is.\n</think>German")}),
        (encoding.pairs, preference(rejected=talk("", "<think>It is not.</think>no")[1:])),
    ],
)
def test_thoughts_that_the_template_takes_out_of_an_answer_are_refused(tmp_path: Path, read: Any, row: Any) -> None:
    """DeepSeek's takes reasoning out of what was said; it would be lost in silence."""
    template = Template(tokenizer(source("deepseek_r1_distill")))
    problem = "the chat template leaves out what an answer says before `</think>`"
    with pytest.raises(UserError, match=rf"row 1: {problem} \((message 2|rejected)\)"):
        read(write(tmp_path / "rows.jsonl", row), template, LIMITS, print)
    row = {"messages": talk("hello", "<think></think>German")} if read is encoding.chats else preference()
    assert read(write(tmp_path / "rows.jsonl", row), template, LIMITS, print)


@pytest.mark.parametrize(
    ("read", "row"),
    [
        (encoding.chats, {"messages": talk("hello", "German")}),
        (encoding.pairs, preference(chosen=talk("", "yes")[1:], rejected=talk("", "German")[1:])),
    ],
)
def test_an_answer_of_which_the_template_writes_nothing_is_refused(tmp_path: Path, read: Any, row: Any) -> None:
    text = "{% for m in messages %}<|{{ m.role }}|>{{ m.content if m.content != 'German' }}</s>{% endfor %}"
    template = Template(tokenizer(text + "{% if add_generation_prompt %}<|assistant|>{% endif %}"))
    with pytest.raises(UserError, match=r"row 1: an answer is rendered as nothing \((message 2|rejected)\)"):
        read(write(tmp_path / "rows.jsonl", row), template, LIMITS, print)


def test_sides_that_are_the_same_tokens_are_refused(tmp_path: Path) -> None:
    """Gemma's template trims what a message says."""
    template = Template(tokenizer(source("gemma")))
    row = preference(chosen=talk("", "yes")[1:], rejected=talk("", " yes ")[1:])
    with pytest.raises(UserError, match="row 1: chosen and rejected are the same tokens"):
        encoding.pairs(write(tmp_path / "pairs.jsonl", row), template, LIMITS, print)
