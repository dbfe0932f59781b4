"""Prompts in tokens: what is asked is rendered with its generation prompt, and the other columns are carried along."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cordee.chat.source import Limits, Rules, Source
from cordee.chat.tokenized import tokenize
from cordee.config import Input
from cordee.errors import UserError
from cordee.stage import Context

QUESTION = [{"role": "user", "content": "How many?"}]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Any]:
    """Reads rows as prompts: `read(rows, **rules)`."""
    from chat_samples import make_tokenizer
    from transformers import AutoTokenizer

    from cordee.chat import base

    make_tokenizer(tmp_path / "model", base.TEMPLATE.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")

    def call(rows: list[dict[str, Any]], *, longest: int | None = None, as_text: bool = False, **rules: Any) -> Any:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (tmp_path / "run").mkdir(exist_ok=True)
        context = Context(tmp_path, 0, tmp_path / "run" / "events.jsonl")
        source = Source(path=Input(file), as_text=as_text)
        given = Rules(Limits(longest, None, len(tokenizer)), **rules)
        found = tokenize("prompts", tokenizer, source, given, context, tmp_path / "cache")
        return tokenizer, found

    return call


def test_a_prompt_is_what_the_template_asks_and_keeps_its_columns(read: Callable[..., Any]) -> None:
    rows = [
        {"prompt": "How many?", "answer": 3, "kind": None, "scores": [1.5]},
        {"messages": [*QUESTION, {"role": "assistant", "content": "Four"}]},
        {"messages": [*QUESTION, {"role": "assistant", "content": "They are four"}], "answer": "4"},
        {"prompt": QUESTION, "language": "de"},
    ]
    tokenizer, found = read(rows)
    asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    prompts = [found.prompt(at) for at in range(len(found))]
    assert all(one.ids.tolist() == asked for one in prompts)
    assert [one.row for one in prompts] == [
        {"prompt": QUESTION, "answer": 3, "scores": [1.5]},
        {"prompt": QUESTION, "answer": "Four"},
        {"prompt": QUESTION, "answer": "4"},
        {"prompt": QUESTION, "language": "de"},
    ]
    assert [one.number for one in prompts] == [1, 2, 3, 4]
    assert found.report["tokens"] == 4 * len(asked)
    assert found.digest() == found.report["digest"]
    assert len(set(found.texts().tolist())) == 1


def test_a_text_is_asked_as_it_stands(read: Callable[..., Any]) -> None:
    tokenizer, found = read([{"prompt": "One, two, ", "answer": "three"}], as_text=True)
    assert found.prompt(0).ids.tolist() == tokenizer("One, two, ")["input_ids"]
    assert found.prompt(0).row == {"prompt": "One, two, ", "answer": "three"}


def test_a_prompt_that_is_too_long_is_named_or_left_out(read: Callable[..., Any]) -> None:
    rows = [{"prompt": "How many?"}, {"prompt": "How many? " * 20}]
    with pytest.raises(UserError, match=r"row 2: a prompt of more than 40 tokens .*`overlong: drop`"):
        read(rows, longest=40)
    _, found = read(rows, longest=40, overlong="drop")
    assert len(found) == 1
    assert found.report["left_out"][0]["rows"] == 1
