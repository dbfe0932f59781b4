"""One error for all that is wrong with the rows of a source."""

from pathlib import Path

import pytest

from cordee.chat.problems import BadRowError, OverlongRowError, Problems
from cordee.data.row import Broken
from cordee.errors import UserError


def gathered(file: Path, found: dict[int, BadRowError]) -> Problems:
    problems = Problems()
    for number, error in found.items():
        with problems.of(file, number, {"row": number}):
            raise error
    return problems


def told(file: Path, found: dict[int, BadRowError]) -> str:
    with pytest.raises(UserError) as caught:
        gathered(file, found).raise_any(file, 100)
    return str(caught.value)


MANY = {number: BadRowError("no answer", f"message {number}", "write one") for number in range(2, 7)}


def test_an_error_tells_how_many_rows_of_which_kinds_and_the_first_three(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    assert told(file, {4: BadRowError("no answer", "message 2", "write one")}) == (
        f"{file}: row 4: no answer (message 2); write one"
    )
    assert told(file, MANY) == (
        f"{file}: 5 of 100 rows (rows 2: message 2, 3: message 3, 4: message 4 and 2 more): no answer; write one"
    )
    assert told(file, {**MANY, 9: BadRowError("too long"), 10: BadRowError("too long")}) == (
        f"{file}: 7 of 100 rows: no answer (rows 2: message 2, 3: message 3, 4: message 4 and 2 more; write one); "
        "too long (rows 9, 10)"
    )


def test_rows_of_a_folder_are_named_with_their_files(tmp_path: Path) -> None:
    problems = gathered(tmp_path / "a.jsonl", {2: BadRowError("no answer")})
    with pytest.raises(UserError, match=r"a\.jsonl: row 2: no answer"):
        problems.raise_any(tmp_path, 9)
    problems.add(gathered(tmp_path / "b.jsonl", {1: BadRowError("no answer")}))
    with pytest.raises(UserError, match=r"2 of 9 rows \(rows a\.jsonl 2, b\.jsonl 1\): no answer"):
        problems.raise_any(tmp_path, 9)


def test_what_batches_find_adds_up(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    whole = Problems()
    for number, error in MANY.items():
        whole.add(gathered(file, {number: error}).counted())
    with pytest.raises(UserError) as caught:
        whole.raise_any(file, 100)
    assert str(caught.value) == told(file, MANY)
    (kind,) = whole.described()
    assert kind["rows"] == 5
    assert kind["first"][0] == {"file": "a.jsonl", "row": 2, "shown_by": "message 2", "text": '{"row": 2}'}


def test_a_row_counts_once_and_what_is_allowed_is_no_error(tmp_path: Path) -> None:
    problems = Problems()
    for error in (BadRowError("no answer"), OverlongRowError("too long")):
        with problems.of(tmp_path, 1, {}):
            raise error
    with problems.of(tmp_path, 2, {}):
        raise OverlongRowError("too long")
    assert problems.count == 2
    with pytest.raises(UserError, match="no answer"):
        problems.raise_any(tmp_path, 2, lambda kind: kind.is_overlong)
    problems.raise_any(tmp_path, 2, lambda _: True)
    Problems().raise_any(tmp_path, 3)


def test_a_row_that_can_not_be_read_is_shown_as_it_stands(tmp_path: Path) -> None:
    problems, row = Problems(), '{"messages": [{"role": "us'
    with problems.of(tmp_path / "a.jsonl", 4, Broken("no JSON object", row)):
        raise BadRowError("no JSON object")
    (kind,) = problems.described()
    assert kind["first"][0]["text"] == row
