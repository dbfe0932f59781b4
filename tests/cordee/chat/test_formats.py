"""Reading rows, and one error for all that is wrong with them."""

from pathlib import Path

import pytest
from families import talk, write

from cordee.chat import formats
from cordee.chat.formats import BadRowError, Problems
from cordee.errors import UserError


def test_parquet_and_json_lines_give_the_same_rows_counted_from_1(tmp_path: Path) -> None:
    rows = [{"messages": talk("a", "b")}, {"messages": talk("c", "d")}]
    one, other = formats.read(write(tmp_path / "a.jsonl", *rows)), formats.read(write(tmp_path / "a.parquet", *rows))
    assert [record.number for record in one] == [1, 2]
    assert [record.values for record in one] == [record.values for record in other] == rows


def problems(file: Path, found: dict[int, BadRowError]) -> str:
    gathered = Problems(file)
    for number, error in found.items():
        with gathered.of(number):
            raise error
    with pytest.raises(UserError) as caught:
        gathered.raise_any(100)
    return str(caught.value)


def test_an_error_tells_how_many_rows_of_which_kinds_and_the_first_three(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    assert problems(file, {4: BadRowError("no answer", "message 2", "write one")}) == (
        f"{file}: row 4: no answer (message 2); write one"
    )
    many = {number: BadRowError("no answer", f"message {number}", "write one") for number in range(2, 7)}
    assert problems(file, many) == (
        f"{file}: 5 of 100 rows (rows 2: message 2, 3: message 3, 4: message 4 and 2 more): no answer; write one"
    )
    assert problems(file, {**many, 9: BadRowError("too long"), 10: BadRowError("too long")}) == (
        f"{file}: 7 of 100 rows: no answer (rows 2: message 2, 3: message 3, 4: message 4 and 2 more; write one); "
        "too long (rows 9, 10)"
    )


def test_rows_without_a_problem_raise_nothing(tmp_path: Path) -> None:
    Problems(tmp_path / "a.jsonl").raise_any(3)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b'{"messages": [\n', "line 1 is no JSON"),
        ("a.jsonl", b"[]\n", "line 1 is no JSON object$"),
        ("a.jsonl", b"{}\n[]\n3\n{\n\n7\n", "line 2 is no JSON object; so are 3 more lines, next 3, 4$"),
        ("a.parquet", b"PAR1", "can't be read as Parquet"),
        ("a.csv", b"messages\n", r"is neither \.parquet nor \.jsonl"),
    ],
)
def test_a_file_that_can_not_be_read_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        formats.read(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_and_bytes_are_estimated_from_a_files_beginning(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"a.{suffix}", *({"messages": talk(f"word{n}" * 9, "b"), "x": "y"} for n in range(400)))
    rows, text_bytes = formats.estimate(file, ["messages"])
    assert rows == pytest.approx(400, rel=0.01)
    assert 400 * 40 < text_bytes < 400 * 200
    with pytest.raises(UserError, match=r"row 1: has no column 'message'; did you mean 'messages'\?"):
        formats.estimate(file, ["message"])
