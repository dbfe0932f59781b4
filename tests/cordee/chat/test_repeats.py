"""Rows that stand there twice, and answers that another row contradicts, of each kind of data."""

from pathlib import Path
from typing import Any

import pytest
from families import source as template_of
from families import talk, tokenizer, write

from cordee.chat import repeats, tokenized
from cordee.chat.source import Limits, Of, Rules, Source
from cordee.chat.tokenized import Tokenized, tokenize
from cordee.stage import Context

QWEN = tokenizer(template_of("qwen3"))
LIMITS = Limits(max_length=256, positions=512, vocab_size=100_000)
TWICE = "1 row stands there twice: posttrain.data removes duplicates"


def read(folder: Path, of: Of, *rows: Any, name: str = "a") -> Tokenized:
    (folder / "logs").mkdir(exist_ok=True)
    context = Context(out=folder / "out", seed=5, events=folder / "logs" / "events.jsonl")
    source = Source.model_validate({"path": str(write(folder / f"{name}.jsonl", *rows))})
    return tokenize(of, QWEN, source, Rules(LIMITS), context, folder / "cache")


def lines(folder: Path, of: Of, *rows: Any) -> list[str]:
    return repeats.lines(of, [read(folder, of, *rows).told()])


def pair(chosen: str, rejected: str, prompt: str = "hello", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def answer(text: str, prompt: str = "hello", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": text, **more}


def test_chats(tmp_path: Path) -> None:
    one, other = {"messages": talk("hello", "German")}, {"messages": talk("hello", "Swiss")}
    assert lines(tmp_path, "chats", one, other) == []
    assert lines(tmp_path, "chats", one, other, {**one, "id": 7}) == [TWICE]
    twice = "2 rows stand there twice: posttrain.data removes duplicates"
    assert lines(tmp_path, "chats", one, other, other, one) == [twice]
    often = "2 rows stand there several times, 5 in all: posttrain.data removes duplicates"
    assert lines(tmp_path, "chats", one, other, other, one, one) == [often]


def test_chats_that_begin_the_same_and_chats_of_several_sequences(tmp_path: Path) -> None:
    """Qwen3 leaves earlier thoughts out, so that an answer is a sequence of its own: two chats may share it."""
    begin = talk("hello", "<think>\nwhy\n</think>\n\nGerman")
    one, other = ({"messages": [*begin, *talk("and?", text)]} for text in ("so", "no"))
    found = read(tmp_path, "chats", one, other)
    assert len(found) == 4
    assert len(set(found.texts().tolist())) == 3
    assert repeats.lines("chats", [found.told()]) == []
    assert lines(tmp_path, "chats", one, other, one) == [TWICE]


def test_pairs(tmp_path: Path) -> None:
    told = "there both ways round: the answer that one row chooses another row rejects"
    assert lines(tmp_path, "pairs", pair("a", "b"), pair("b", "c"), pair("b", "a", "why")) == []
    assert lines(tmp_path, "pairs", pair("a", "b"), pair("b", "a")) == [f"1 pair stands {told}"]
    rows = [pair("a", "b"), pair("c", "d"), pair("b", "a"), pair("d", "c"), pair("e", "f")]
    assert lines(tmp_path, "pairs", *rows) == [f"2 pairs stand {told}"]
    assert lines(tmp_path, "pairs", pair("a", "b"), pair("c", "d"), pair("a", "b", note="x")) == [TWICE]


def test_answers_that_are_good_and_bad(tmp_path: Path) -> None:
    told = "1 answer stands there as good and as bad"
    good, bad = answer("yes", label=True), answer("yes", label=False)
    assert lines(tmp_path, "labelled", good, answer("no", label=False), {**bad, "prompt": "why"}) == []
    assert lines(tmp_path, "labelled", good, answer("no", label=False), bad) == [told]
    assert lines(tmp_path, "labelled", good, answer("no", label=False), good) == [TWICE]
    ways = lines(tmp_path, "labelled", pair("a", "b"), pair("b", "a"))
    assert ways == ["2 answers stand there as good and as bad"], "and these rows are no duplicates"


def test_answers_with_rewards(tmp_path: Path) -> None:
    given = {"reference_rewards": [0.0, 1.0]}
    one, other = (answer("yes", reward=reward, **given) for reward in (0.5, 0.25))
    assert lines(tmp_path, "scored", one, other, other) == [TWICE, "1 answer stands there with different rewards"]


def test_prompts(tmp_path: Path) -> None:
    """The same question with another answer is another row."""
    row = {"prompt": "hello", "answer": "1"}
    assert lines(tmp_path, "prompts", row, {**row, "answer": "2"}) == []
    assert lines(tmp_path, "prompts", row, {**row, "answer": "2"}, row) == [TWICE]


def test_rows_of_several_sources_and_of_none(tmp_path: Path) -> None:
    row = {"messages": talk("hello", "German")}
    parts = [read(tmp_path, "chats", row, name=name).told() for name in ("a", "b")]
    assert repeats.lines("chats", parts) == [TWICE]
    assert repeats.lines("chats", [{name: values[:0] for name, values in parts[0].items()}]) == []
    assert repeats.lines("chats", []) == []


def test_hashes_are_the_same_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"messages": talk(f"question {n}", "answer")} for n in range(2200)]
    alone = read(tmp_path, "chats", *rows, rows[0])
    monkeypatch.setattr(tokenized, "PARALLEL_BYTES", 0)
    (tmp_path / "cache").rename(tmp_path / "before")
    found = read(tmp_path, "chats", *rows, rows[0])
    assert (found.texts() == alone.texts()).all()
    assert repeats.lines("chats", [found.told()]) == [TWICE]
