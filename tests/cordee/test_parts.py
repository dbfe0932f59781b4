"""Parts cover all items once, whatever sizes they were written with, and one file is made of them."""

from pathlib import Path

import pytest

from cordee import parts


def test_parts_of_an_earlier_size_are_kept_and_gaps_are_filled(tmp_path: Path) -> None:
    assert list(parts.ends(tmp_path, 7, 3)) == [(3, False), (6, False), (7, False)]
    parts.write(tmp_path, 2, 4, [{"n": n} for n in (2, 3)])
    assert list(parts.ends(tmp_path, 7, 3)) == [(2, False), (4, True), (7, False)]
    (tmp_path / ".000000000-000000002.jsonl.7.tmp").write_text("half a li")
    assert next(parts.ends(tmp_path, 7, 3)) == (2, False)


def test_all_parts_are_one_file_in_their_order(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    rows = [{"text": f"a\u2028{n}"} for n in range(12)]
    for first, end in ((9, 12), (0, 9)):
        parts.write(folder, first, end, rows[first:end])
    assert list(parts.read(folder)) == rows
    parts.join(folder, tmp_path / "all" / "whole.jsonl")
    assert list(parts.lines(tmp_path / "all" / "whole.jsonl")) == rows
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["whole.jsonl"]


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("posttrain.rewards.functions", "number_match", {"completions": (True, False), "answer": (True, False),
                                                         "tolerance": (False, True)}),
        ("trl.rewards", "get_soft_overlong_punishment", {"max_completion_len": (True, False),
                                                         "soft_punish_cache": (True, False)}),
        ("posttrain.rewards.functions", "nothing", None),
    ],
)  # fmt: skip
def test_the_parameters_of_a_function_are_read_from_its_source(module: str, name: str, expected: object) -> None:
    from cordee import peek

    found = peek.parameters(module, name)
    told = None if found is None else {key: (one.is_required, one.is_keyword) for key, one in found.items()}
    assert told == expected
