"""Single answers in tokens: the shapes they come in, what rows say of them, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from families import source, talk, tokenizer, write

from cordee.chat import answers
from cordee.chat.conversations import Encoder
from cordee.chat.problems import Notes, Problems
from cordee.chat.selection import files_of, selected
from cordee.chat.source import Limits, Rules, Source
from cordee.chat.tokenized import Tokenized, tokenize
from cordee.errors import UserError
from cordee.stage import Context

QWEN = tokenizer(source("qwen2_5"))
LIMITS = Limits(max_length=1024, positions=2048, vocab_size=100_000)
ASKED, YES, NO = talk("hello", "yes")[:1], talk("", "yes")[1:], talk("", "no no")[1:]


def read(file: Path, needs: Any, limits: Limits = LIMITS, **given: Any) -> list[answers.TokenAnswer]:
    rules = {name: given.pop(name) for name in ("bad_rows", "overlong") if name in given}
    kept = Source.model_validate({"path": str(file), **given})
    encoder = Encoder.of(QWEN, kept, Rules(limits, **rules))
    rows = [row for batch in selected(kept, files_of(kept).documents, 0) for row in batch]
    problems = Problems()
    found = answers.encode(rows, encoder, problems, Notes(), needs)
    problems.raise_any(file, len(rows), lambda kind: kind.is_overlong and rules.get("overlong") == "drop")
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "completion": YES, "label": True},
        {"prompt": "hello", "completion": "yes", "label": "true"},
        {"messages": [*ASKED, *YES], "label": 1},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}], "label": "1"},
        {"messages": [*ASKED, *YES], "label": True, "model": "base", "finish_reason": "stop", "sample": 3},
    ],
)
def test_a_row_is_an_answer_in_the_forms_that_people_have(tmp_path: Path, row: dict[str, Any]) -> None:
    (one,) = read(write(tmp_path / "a.jsonl", row), "labelled")
    assert QWEN.decode(one.prompt).endswith("hello<|im_end|>\n<|im_start|>assistant\n")
    assert QWEN.decode(one.completion) == "yes<|im_end|>\n"
    assert one.label == 1.0


def test_a_pair_is_two_answers_with_what_it_says_of_each(tmp_path: Path) -> None:
    row = {"prompt": ASKED, "chosen": YES, "rejected": NO, "chosen_reward": 2.5, "rejected_reward": -1}
    row |= {"chosen_reference_logprob": -3.5, "reference_rewards": [-1.0, 0.0, 2.0]}
    good, bad = read(write(tmp_path / "a.jsonl", row), "scored")
    assert (good.label, good.reward, good.reference_logprob) == (1.0, 2.5, -3.5)
    assert (bad.label, bad.reward) == (0.0, -1.0)
    assert bad.reference_logprob is None
    assert good.reference_rewards == bad.reference_rewards == (-1.0, 0.0, 2.0)
    assert good.prompt == bad.prompt
    assert QWEN.decode(bad.completion) == "no no<|im_end|>\n"
    assert [one.label for one in read(tmp_path / "a.jsonl", "labelled")] == [1.0, 0.0]


SCORED = {"prompt": ASKED, "completion": YES, "reward": 1.0, "reference_rewards": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("needs", "row", "message"),
    [
        ("labelled", {"prompt": ASKED, "completion": YES}, "does not say whether the answer is good"),
        ("labelled", {"prompt": ASKED, "completion": YES, "label": "good"}, "label is neither true nor false"),
        ("scored", SCORED | {"reward": None}, "has no reward"),
        ("scored", SCORED | {"reward": "high"}, "reward is no number"),
        ("scored", SCORED | {"reference_rewards": None}, "has no rewards of the reference model's own answers"),
        ("scored", SCORED | {"reference_rewards": [1.0, None]}, "reference_rewards holds an item that is no number"),
        ("scored", SCORED | {"reference_rewards": 3}, "reference_rewards is no list of numbers"),
        ("scored", SCORED | {"reference_logprob": float("inf")}, "reference_logprob is no number"),
        ("scored", {"prompt": ASKED, "chosen": YES, "rejected": NO}, "has no reward"),
        ("labelled", {"text": "hello", "label": True}, "is no prompt with an answer but text"),
        ("labelled", {"messages": ASKED, "label": True}, "does not end with an answer of the assistant"),
        ("labelled", {"prompt": [*ASKED, *YES], "completion": YES, "label": True}, "nothing to answer"),
        ("labelled", {"promt": "hello", "completion": "yes", "label": True}, r"columns: \{promt: prompt\}"),
    ],
)
def test_a_row_without_what_is_learnt_from_is_refused(
    tmp_path: Path, needs: Any, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "a.jsonl", row), needs)


def test_a_cut_answer_keeps_no_log_probability_of_the_whole(tmp_path: Path) -> None:
    long = SCORED | {"completion": talk("", "word " * 200)[1:], "reference_logprob": -300.0}
    file = write(tmp_path / "a.jsonl", SCORED | {"reference_logprob": -1.0}, long)
    limits = Limits(100, 2048, 100_000)
    with pytest.raises(UserError, match="longer than max_length=100 tokens"):
        read(file, "scored", limits)
    whole, cut = read(file, "scored", limits, overlong="cut")
    assert (whole.reference_logprob, cut.tokens) == (-1.0, 100)
    assert cut.reference_logprob is None
    assert [one.number for one in read(file, "scored", limits, overlong="drop")] == [1]


def test_what_is_read_comes_back_from_the_disk(tmp_path: Path) -> None:
    context = Context(out=tmp_path, seed=1, events=tmp_path / "events.jsonl")
    rows = [SCORED | {"reference_rewards": [0.1 * n] * (n + 1), "reward": 0.3 * n} for n in range(5)]
    file = write(tmp_path / "a.jsonl", *rows)
    found = tokenize("scored", QWEN, Source.model_validate({"path": str(file)}), Rules(LIMITS), context, tmp_path / "c")
    assert isinstance(found, Tokenized)
    for at, one in enumerate(read(file, "scored")):
        told = found.answer(at)
        assert (told.prompt, told.completion, told.reward) == (one.prompt, one.completion, one.reward)
        assert (told.reference_rewards, told.number) == (one.reference_rewards, one.number)
    assert found.floats("reward").tolist() == [0.3 * n for n in range(5)]
    assert found.lengths("reference_rewards").tolist() == [1, 2, 3, 4, 5]
