"""Malformed and odd data files: each is read as the keys say, or is one line that names file, rows, count and key."""

import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from families import CALL, source, tokenizer
from odd_rows import ASKED, CHAT, PAIR, SAID, UNREAD_CHATS, UNREAD_PAIRS, lines, nested, said

from cordee.chat.source import Limits, Rules, Source
from cordee.chat.tokenized import Tokenized, tokenize
from cordee.errors import UserError
from cordee.stage import Context

QWEN = tokenizer(source("qwen2_5"))
LIMITS = Limits(max_length=160, positions=256, vocab_size=100_000)
DROP = "`bad_rows: drop` leaves such rows out and counts them"
LONG = "German " * 100

Read = Callable[..., Tokenized]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads a path; `given` are fields of `Rules` and of `Source`."""
    (tmp_path / "logs").mkdir()
    context = Context(out=tmp_path / "out", seed=5, events=tmp_path / "logs" / "events.jsonl")

    def call(
        path: Path, of: Any = "chats", bad_rows: Any = "error", overlong: Any = "error", **given: Any
    ) -> Tokenized:
        rules = Rules(LIMITS, bad_rows, overlong)
        found = Source.model_validate({"path": str(path), **given})
        return tokenize(of, QWEN, found, rules, context, tmp_path / "cache")

    return call


def put(path: Path, content: Any) -> Path:
    """Bytes, or the rows of a Parquet file."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(pa.Table.from_pylist(content), path)
    return path


def trained(found: Tokenized) -> list[str]:
    """What carries loss in each sequence of chats."""
    chats = map(found.conversation, range(len(found)))
    return [QWEN.decode(chat.ids[chat.has_loss]).replace("<|im_end|>", "").strip() for chat in chats]


@pytest.mark.parametrize(
    ("of", "good", "row", "problem"),
    [
        pytest.param(of, good, *rows[name], id=f"{of}: {name}")
        for of, good, rows in (("chats", CHAT, UNREAD_CHATS), ("pairs", PAIR, UNREAD_PAIRS))
        for name in rows
    ],
)
def test_a_row_that_can_not_be_used_is_an_error_or_dropped(
    read: Read, tmp_path: Path, of: str, good: Any, row: Any, problem: str
) -> None:
    file = put(tmp_path / "a.jsonl", lines(good, row, good))
    with pytest.raises(UserError) as caught:
        read(file, of, overlong="drop")
    line = str(caught.value)
    assert line.startswith(f"{file}: row 2: ")
    assert problem in line
    assert line.endswith(f"; {DROP}")
    assert "\n" not in line
    assert len(line) < 500
    for overlong in ("error", "cut"):
        found = read(file, of, bad_rows="drop", overlong=overlong)
        (kind,) = found.report["left_out"]
        assert (len(found), found.report["rows"], kind["rows"]) == (2, 3, 1)
        assert kind["first"][0]["row"] == 2


FURTHER = lines(CHAT).decode().replace("}\n", ', "n": %s}\n')
IN_CSV = json.dumps([ASKED, SAID], indent=1).replace('"', '""').encode()
USED: dict[str, tuple[str, Any, list[str]]] = {
    "BOM": ("a.jsonl", b"\xef\xbb\xbf" + lines(CHAT), ["German"]),
    "CRLF": ("a.jsonl", lines(CHAT, CHAT).replace(b"\n", b"\r\n"), ["German"] * 2),
    "blank lines": ("a.jsonl", b"\n \n" + lines(CHAT) + b"\n\n" + lines(CHAT), ["German"] * 2),
    "compressed": ("a.jsonl.gz", gzip.compress(lines(CHAT)), ["German"]),
    "an array": ("a.json", json.dumps([CHAT, CHAT], indent=1).encode(), ["German"] * 2),
    "an object of rows": ("a.json", json.dumps({"data": [CHAT]}).encode(), ["German"]),
    "a key twice, of which the last counts": ("a.jsonl", b'{"messages": [], ' + lines(CHAT)[1:], ["German"]),
    "NaN beside": ("a.jsonl", (FURTHER % "NaN").encode(), ["German"]),
    "a number of 400 digits beside": ("a.jsonl", (FURTHER % 10**400).encode(), ["German"]),
    "a column of mixed types": ("a.jsonl", (FURTHER % "3" + FURTHER % "[1]").encode(), ["German"] * 2),
    "a huge line": ("a.jsonl", (FURTHER % json.dumps("x " * 500_000)).encode(), ["German"]),
    "CSV with JSON": ("a.csv", b'messages\n"%s"\n' % IN_CSV, ["German"]),
    "CSV of prompts": ("a.csv", b"prompt,completion\nhello,German\n", ["German"]),
    "CSV with semicolons": ("a.csv", b'prompt;completion\nhello;"Ger\nman"\n', ["Ger\nman"]),
    "turns out of order": ("a.jsonl", lines(said(SAID, ASKED, ASKED, SAID, SAID)), ["GermanGermanGerman"]),
    "an empty question": ("a.jsonl", lines(said({"role": "user", "content": ""}, SAID)), ["German"]),
    "an empty list of tools": ("a.jsonl", lines(said(ASKED, SAID, tools=[])), ["German"]),
    "nulls in a struct": (
        "a.parquet",
        [said({**ASKED, "tool_calls": None}, SAID), said(ASKED, {**SAID, "content": None, "tool_calls": [CALL]})],
        ["German", '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'],
    ),
}  # fmt: skip
"""Name → a file's name and content, and what is trained of it."""


@pytest.mark.parametrize("name", USED)
def test_an_odd_file_that_can_be_used_is_used(read: Read, tmp_path: Path, name: str) -> None:
    file_name, content, expected = USED[name]
    found = read(put(tmp_path / file_name, content))
    assert trained(found) == expected
    assert found.report["left_out"] == []


BROKEN: dict[str, tuple[str, Any, str]] = {
    "cut off in an array": ("a.json", json.dumps([CHAT, CHAT]).encode()[:-20], r"no JSON in line 1.*1 row was read"),
    "cut off in gzip": ("a.jsonl.gz", gzip.compress(lines(*[CHAT] * 99))[:-20], "Compressed file ended"),
    "no gzip": ("a.jsonl.gz", lines(CHAT), "can't be read to its end: Not a gzipped file"),
    "no Parquet": ("a.parquet", lines(CHAT), "can't be read as Parquet"),
    "Parquet cut off": ("a.parquet", b"PAR1" + bytes(99), "can't be read as Parquet"),
    "no Arrow": ("a.arrow", lines(CHAT), "can't be read as Arrow"),
    "a quote that does not end": ("a.csv", b'prompt,completion\na,"b\n', "no CSV in line 2"),
    "empty": ("a.jsonl", b"", "holds no rows"),
    "an empty array": ("a.json", b"[]", "holds no rows"),
    "a header alone": ("a.csv", b"prompt,completion\n", "holds no rows"),
    "of no kind": ("a.yaml", b"a: 1\n", "is no .parquet, .arrow, .jsonl"),
}  # fmt: skip
"""Name → a file's name and content, and why it can't be read, whatever the keys say."""


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("of", ["chats", "pairs"])
def test_a_file_that_can_not_be_read_is_one_line(read: Read, tmp_path: Path, of: str, name: str) -> None:
    file_name, content, problem = BROKEN[name]
    file = put(tmp_path / file_name, content)
    for rules in ({}, {"bad_rows": "drop", "overlong": "cut"}):
        with pytest.raises(UserError, match=problem) as caught:
            read(file, of, **rules)
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        ([["x", SAID]] * 2, "a.json", "2 no JSON object"),
        ([1, None, "x"], "a.json", "3 no JSON object"),
        ([{}, {"messages": []}], "a.json", "1 can't be told what it is: its columns are none; 1 messages is empty"),
    ],
)
def test_a_file_of_which_no_row_can_be_used_has_no_key_that_settles_it(
    read: Read, tmp_path: Path, content: Any, name: str, problem: str
) -> None:
    file = put(tmp_path / name, json.dumps(content).encode())
    with pytest.raises(UserError, match=rf"{len(content)} of {len(content)} rows") as caught:
        read(file)
    assert "bad_rows" not in str(caught.value)
    with pytest.raises(UserError, match=f"no row of {len(content)} is left: {problem}"):
        read(file, bad_rows="drop")


def test_trailing_commas_and_other_encodings_are_told(read: Read, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 of 2 rows.*a comma behind the object, which JSON lines do not have"):
        read(put(tmp_path / "a.jsonl", lines(CHAT, CHAT).replace(b"\n", b",\n")))
    with pytest.raises(UserError, match="row 2: no UTF-8"):
        read(put(tmp_path / "b.jsonl", lines(CHAT) + '{"text": "Würde"}\n'.encode("latin-1")))


OVERLONG: dict[str, tuple[str, Any, dict[str, int]]] = {
    "an answer": ("chats", said(ASKED, {**SAID, "content": LONG}), {"cut": 2}),
    "a question": ("chats", said({**ASKED, "content": LONG}, SAID), {}),
    "a second answer": ("chats", said(ASKED, SAID, ASKED, {**SAID, "content": LONG}), {"truncate": 2, "cut": 2}),
    "a text": ("chats", {"text": LONG}, {"truncate": 2, "cut": 2}),
    "an answer of a pair": ("pairs", {**PAIR, "chosen": LONG}, {"cut": 2}),
    "a prompt of a pair": ("pairs", {**PAIR, "prompt": LONG}, {}),
}
"""Name → what it holds, a row that is too long, and how many sequences of two rows are left, if not one."""


@pytest.mark.parametrize("name", OVERLONG)
def test_what_is_too_long_goes_as_the_key_says(read: Read, tmp_path: Path, name: str) -> None:
    of, row, left = OVERLONG[name]
    file = put(tmp_path / "a.jsonl", lines(CHAT if of == "chats" else PAIR, row))
    with pytest.raises(UserError, match=r"row 2: longer than max_length=160 tokens.*\(\d+ tokens\)") as caught:
        read(file, of, bad_rows="drop")
    assert str(caught.value).endswith("raise it, or `overlong: drop`, `truncate` or `cut` settles it")
    for overlong in ("drop", "truncate", "cut"):
        found = read(file, of, overlong=overlong)
        assert len(found) == left.get(overlong, 1)
        assert sum(kind["rows"] for kind in found.report["left_out"]) == 2 - len(found)
        lists = ("ids",) if of == "chats" else ("prompt", "chosen")
        assert max(sum(found.lengths(one) for one in lists)) <= 160


def test_what_a_cut_makes_equal_is_left_out(read: Read, tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", lines(PAIR, {**PAIR, "chosen": LONG, "rejected": f"{LONG} no"}))
    found = read(file, "pairs", overlong="cut")
    assert len(found) == 1
    (kind,) = found.report["left_out"]
    assert kind["problem"].endswith("tokens, and the answers differ only behind it")


def test_what_is_nested_deeply_is_a_problem_of_its_row(read: Read, tmp_path: Path) -> None:
    """Python's own limit is met at 1,000 levels: by JSON above, by what looks into the values below."""
    rows = [(FURTHER % nested(depth)).encode() for depth in (100, 700, 950, 5000)]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # libraries that other tests import raise it
    try:
        found = read(put(tmp_path / "a.jsonl", b"".join(rows)), bad_rows="drop")
    finally:
        sys.setrecursionlimit(limit)
    assert found.numbers("number").tolist() == [1]
    assert {kind["problem"] for kind in found.report["left_out"]} == {"is nested too deeply", "no JSON object"}


def test_kinds_of_problems_are_told_apart_up_to_a_number(read: Read, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a", f"key {number}": 1}]} for number in range(99)]
    found = read(put(tmp_path / "a.jsonl", lines(CHAT, *rows)), bad_rows="drop")
    *apart, rest = found.report["left_out"]
    assert (len(apart), rest["problem"], rest["rows"]) == (20, "other problems", 79)


def folder_named_as_a_file(folder: Path) -> Path:
    (folder / "x.jsonl").mkdir()
    return put(folder / "x.jsonl" / "part-0.jsonl", lines(CHAT)).parent


def link_within(folder: Path) -> Path:
    put(folder / "rows.jsonl", lines(CHAT))
    (folder / "within").mkdir()
    (folder / "within" / "b.jsonl").symlink_to(folder / "rows.jsonl")
    return folder / "within"


@pytest.mark.parametrize("make", [folder_named_as_a_file, link_within])
def test_a_place_that_is_odd_and_can_be_read_is_read(read: Read, tmp_path: Path, make: Any) -> None:
    assert trained(read(make(tmp_path))) == ["German"]


def empty_folder(folder: Path) -> Path:
    (folder / "x.jsonl").mkdir()
    return folder / "x.jsonl"


def broken_link(folder: Path) -> Path:
    (folder / "a.jsonl").symlink_to(folder / "gone.jsonl")
    return folder / "a.jsonl"


def broken_link_within(folder: Path) -> Path:
    (folder / "within").mkdir()
    put(folder / "within" / "a.jsonl", lines(CHAT))
    (folder / "within" / "b.jsonl").symlink_to(folder / "gone.jsonl")
    return folder / "within"


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (empty_folder, "the folder holds no .parquet"),
        (broken_link, "there is no such file or folder"),
        (broken_link_within, r"within/b.jsonl: path: is a link to .*gone.jsonl, which is not there"),
    ],
)
def test_a_place_that_can_not_be_read_is_one_line(read: Read, tmp_path: Path, make: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        read(make(tmp_path), bad_rows="drop")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_line(read: Read, tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", lines(CHAT))
    file.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        read(file)
