"""Every kind of data file gives the same rows; what can't be read is a row that says why, or one line."""

import datetime as dt
import json
import math
import os
import subprocess
import sys
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from odd_files import PACK, found, lines, numbered, put, read

from cordee.data.row import COMMA, HALF, NO_JSON, NO_UTF8
from cordee.data.rows import batches, estimate
from cordee.errors import UserError

BOM = b"\xef\xbb\xbf"
ROWS = [{"a": 1, "b": "x"}, {"a": None, "b": "é\u2028"}, {"b": ""}]
PLACED = [("line 1", ROWS[0]), ("line 2", ROWS[1]), ("line 3", ROWS[2])]
COUNTED = [("row 1", ROWS[0]), ("row 2", ROWS[1]), ("row 3", ROWS[2])]


def pretty(value):
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


PLAIN = lines(ROWS)
LAYOUTS = {
    "lines": (PLAIN, PLACED),
    "lines in UTF-8": ("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(), PLACED),
    "lines of an editor": (BOM + PLAIN.replace(b"\n", b"\r\n"), PLACED),
    "blank lines": (b"\n" + PLAIN.replace(b"\n", b"\n\n"), [(f"line {2 * n + 2}", row) for n, row in enumerate(ROWS)]),
    "array": (json.dumps(ROWS).encode(), COUNTED),
    "array of an editor": (BOM + b"\r\n " + pretty(ROWS).replace(b"\n", b"\r\n"), COUNTED),
    "array of lines": (b"[\n" + b",\n".join(PLAIN.splitlines()) + b"\n]\n", COUNTED),
    "objects over lines": (
        b"\n".join(map(pretty, ROWS)),
        [("line 1", ROWS[0]), ("line 5", ROWS[1]), ("line 9", ROWS[2])],
    ),
    "wrapped": (pretty({"data": ROWS}), COUNTED),
    "wrapped in a line": (json.dumps({"examples": ROWS}).encode(), COUNTED),
    "wrapped in lines": (b'{"version": 1, "data": [\n' + b",\n".join(PLAIN.splitlines()) + b"\n]}\n", COUNTED),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson"])
def test_json_is_read_in_any_layout(tmp_path, name, suffix):
    content, rows = LAYOUTS[name]
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(content)
    assert found(file) == rows


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "txt"])
def test_compressed_files_hold_the_same_rows(tmp_path, pack, suffix):
    plain = {"csv": b"a,b\n1,x\n2,y\n", "txt": b"one\ntwo\n\nthree\n"}.get(suffix, pretty(ROWS))
    put(tmp_path, {f"a.{suffix}": plain, f"b.{suffix}.{pack}": PACK[pack](plain[:9]) + PACK[pack](plain[9:])})
    rows = found(tmp_path / f"a.{suffix}")
    assert rows == found(tmp_path / f"b.{suffix}.{pack}")
    assert len(rows) > 1


ALONE = {
    "a chat": ({"messages": [{"role": "user", "content": "Hi"}]}, 1),
    "a ShareGPT chat": ({"conversations": [{"from": "human", "value": "Hi"}]}, 1),
    "a document": ({"text": "Hi", "authors": [{"name": "A"}]}, 1),
    "columns": ({"text": ["a", "b"]}, 1),
    "an empty list": ({"data": []}, 1),
    "an object": ({}, 1),
    "rows": ({"rows": [{"text": "a"}, {"text": "b"}]}, 2),
}


@pytest.mark.parametrize("name", ALONE)
def test_an_only_object_is_a_row_unless_it_holds_rows(tmp_path, name):
    value, count = ALONE[name]
    for content in (json.dumps(value).encode(), pretty(value)):
        (tmp_path / "a.json").write_bytes(content)
        rows = found(tmp_path / "a.json")
        assert len(rows) == count
        assert count > 1 or rows == [("line 1", value)]


BROKEN = {
    NO_JSON: [b'{"a": 1', b"[1]", b"null", b'"text"', b'{"n": ' + b"1" * 5000 + b"}", b'{"n": ' + b"[" * 100_000],
    NO_UTF8: [b'{"a": "\xff"}', b'{"a": "Z\xfcrich"}'],
    HALF: [b'{"a": "\\ud800"}', b'{"a": {"b": ["\\uDFFF"]}}'],
    COMMA: [b'{"a": 1},', b'{"a": "}"} , '],
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_line_that_is_no_row_says_why_and_the_others_are_read(tmp_path, problem):
    file = tmp_path / "a.jsonl"
    for line in BROKEN[problem]:
        for content, place in ((b'{"a": 0}\n' + line + b"\n", 1), (line + b'\n{"a": 0}\n', 0)):
            file.write_bytes(content)
            rows = found(file)
            assert rows[place] == (f"line {place + 1}", problem)
            assert rows[1 - place] == (f"line {2 - place}", {"a": 0})


def test_a_row_of_an_array_that_is_none_says_why(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, 3, {"a": "\xff"}, {"a": "\\ud800"}, ["b"], {"a": "\\ud83d\\ude00"}]')
    problems = [NO_JSON, NO_UTF8, HALF, NO_JSON]
    assert [what for _, what in found(tmp_path / "a.json")] == [{"a": 1}, *problems, {"a": "\U0001f600"}]


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "[é]"}]
TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
CHATS = {
    "lines": (lines([TALK, TURNS]), ["line 1", "line 2"]),
    "a line": (lines([TALK]), ["line 1"]),
    "beside rows": (lines([{"messages": TALK}, TURNS]), ["line 1", "line 2"]),
    "an array of chats": (json.dumps([TALK, TURNS]).encode(), ["row 1", "row 2"]),
    "over lines": (pretty(TALK) + b"\n" + pretty(TURNS), ["line 1", "line 11"]),
    "long lines": (lines([[{"role": "user", "content": "é" * 99_999}, *TALK], TURNS]), ["line 1", "line 2"]),
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_list_of_messages_is_a_row(tmp_path, name, suffix):
    content, places = CHATS[name]
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(content)
    rows = found(file)
    assert [place for place, _ in rows] == places
    for (_, values), expected in zip(rows, (TALK, TURNS), strict=False):
        assert list(values) == ["messages"]
        assert values["messages"][-2:] == expected


def test_an_array_of_rows_with_such_a_column_holds_rows(tmp_path):
    rows = [{"role": "nurse", "name": "Ada"}, {"role": "pilot", "name": "Bo"}]
    put(tmp_path, {"a.json": json.dumps(rows).encode()})
    assert [values for _, values in found(tmp_path / "a.json")] == rows
    put(tmp_path, {"b.jsonl": lines([TALK, [1, 2], [], ["a"]])})
    assert [values for _, values in found(tmp_path / "b.jsonl")][1:] == [NO_JSON] * 3


def test_values_are_kept_as_they_come(tmp_path):
    odd = [{"v": math.nan}, {"v": 10**50}, {"v": 1}, {"v": "one"}, {"v": [1, "a"]}, {"v": -math.inf}, {"v": True}]
    put(tmp_path, {"a.jsonl": odd, "b.json": json.dumps(odd).encode()})
    for name in ("a.jsonl", "b.json"):
        assert str([row.values for row in read(tmp_path / name)]) == str(odd)


def test_empty_files_hold_no_row(tmp_path):
    for name in ("a.json", "a.jsonl", "a.csv", "a.tsv", "a.txt", "b.json", "b.csv"):
        (tmp_path / name).write_bytes(b"" if name[0] == "a" else b"\n \n")
        assert (found(tmp_path / name), estimate([tmp_path / name])[0]) == ([], 0)
    (tmp_path / "c.json").write_bytes(b"[]")
    assert found(tmp_path / "c.json") == []


CUT = {
    "no end": (b'[{"a": 1}, {"a": 2}', "the array does not end; 2 rows were read before"),
    "within a row": (b'[{"a": 1},\n{"a": ', "no JSON in line 2: Expecting value; 1 row was read before"),
    "within": (b'[{"a": 1},\n\n{"a": }, {"a": 2}]', "no JSON in line 3: Expecting value; 1 row was read before"),
    "two arrays": (b'[{"a": 1}]\n[{"a": 2}]', "no JSON in line 1: more stands behind the array; 1 row was read before"),
    "an object over lines": (
        b'{\n"a": 1\n}\n' * 2 + b'{\n"a": ',
        "no JSON in line 8: Expecting value; 2 rows were read before",
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_json_that_breaks_off_is_one_line(tmp_path, name):
    content, told = CUT[name]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path}/a.json: data: can't be read to its end: ")
    assert told in str(caught.value)


def test_json_is_read_whatever_a_piece_of_the_file_ends_with(tmp_path, monkeypatch):
    odd = ["\U0001f600é", {"n": -math.inf, "b": [True, None, 10**30, 1.5e-7]}, '"\\', "", []]
    rows = [{"v": value, "w": index} for index, value in enumerate(odd * 3)]
    for text in (json.dumps(rows), json.dumps(rows, ensure_ascii=False, indent=2), "\n".join(map(json.dumps, rows))):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        for size in (1, 2, 3, 5, 17, 64):
            monkeypatch.setattr("cordee.data.lines.CHUNK_BYTES", size)
            assert [row.values for row in read(tmp_path / "a.json")] == rows


def test_what_is_no_json_is_seen_before_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("cordee.data.lines.CHUNK_BYTES", 1000)
    (tmp_path / "a.json").write_bytes(b"[" + b'{"a": 1},\n' * 1000 + b'{"a" 1},\n' + b'{"a": 1},\n' * 100_000)
    with pytest.raises(UserError, match="no JSON in line 1001: Expecting ':' delimiter; 1000 rows were read before"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("pack", PACK)
def test_a_compressed_file_that_is_cut_off_is_one_line(tmp_path, pack):
    file = tmp_path / f"a.jsonl.{pack}"
    rows = [{"n": number, "text": os.urandom(100).hex()} for number in range(5000)]
    for content in (PACK[pack](lines(rows))[:-5000], PACK[pack](lines(rows))[:30_000] + bytes(9000)):
        file.write_bytes(content)
        done: list[int] = []
        with pytest.raises(UserError, match="can't be read to its end: ") as caught:
            done.extend(len(batch) for batch in batches([file], 10))
        assert "\n" not in str(caught.value)
        told = int(str(caught.value).rpartition("; ")[2].split()[0])
        assert sum(done) <= told <= sum(done) + 10
        assert told or content[-1] == 0


def test_a_file_that_is_something_else_is_one_line(tmp_path):
    for name in ("a.jsonl.gz", "a.csv.zst", "a.txt.bz2", "a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"plain text, no such file at all")
        with pytest.raises(UserError, match=r"a\.\w+(\.\w+)?: data: can't be read"):
            read(tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "gone.jsonl")


def table_file(file, table):
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=400)
    else:
        with (pa.ipc.new_stream if "stream" in file.name else pa.ipc.new_file)(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    return file


TABLES = ("a.parquet", "stream.arrow", "file.arrow")


@pytest.mark.parametrize("name", TABLES)
def test_tables_give_python_values(tmp_path, name):
    day, moment = dt.date(1948, 12, 10), dt.datetime(2020, 1, 2, 3, 4, 5, 6, tzinfo=dt.UTC)
    rows = [
        {"messages": [{"role": "user", "tool_calls": None}], "day": day, "at": moment, "raw": b"\xff", "n": None},
        {"messages": None, "day": None, "at": None, "raw": None, "n": 2**62},
    ]
    file = table_file(tmp_path / name, pa.Table.from_pylist(rows))
    assert found(file) == [("row 1", rows[0]), ("row 2", rows[1])]
    assert [list(row.values) for row in read(file)] == [list(rows[0])] * 2


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_a_table_are_numbered_through_and_estimated_exactly(tmp_path, name):
    file = table_file(tmp_path / name, pa.Table.from_pylist(numbered(1000)))
    rows = read(file, size=77)
    assert [row.values for row in rows] == numbered(1000)
    assert [row.number for row in rows] == list(range(1, 1001))
    count, text_bytes = estimate([file, file])
    assert count == 2000
    assert 20_000 < text_bytes < 100_000


@pytest.mark.parametrize("name", TABLES)
def test_a_row_of_a_table_that_python_can_not_hold_says_why(tmp_path, name):
    text = pa.array([b"a", b"\xff", b"c", b"d"], pa.binary()).view(pa.string())
    nested = pa.StructArray.from_arrays([text.take(pa.array([0, 2, 3, 1]))], ["s"])
    days = pa.array([0, 0, 9_000_000_000_000_000, 0], pa.timestamp("s"))
    file = table_file(tmp_path / name, pa.table({"text": text, "nested": nested, "day": days}))
    good, *bad = read(file)
    assert good.values["nested"] == {"s": "a"}
    assert [row.values.problem for row in bad] == [NO_UTF8, "a value that Python can't hold", NO_UTF8]
    assert [row.place for row in bad] == ["row 2", "row 3", "row 4"]
    assert "'text': 'c'" in bad[1].values.row


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_cut_off_is_one_line(tmp_path, name):
    file = table_file(tmp_path / name, pa.Table.from_pylist(numbered(1000)))
    file.write_bytes(file.read_bytes()[: -file.stat().st_size // 3])
    with pytest.raises(UserError, match=f"{name}: data: can't be read as (Parquet|Arrow)") as caught:
        read(file)
    assert "\n" not in str(caught.value)
    assert name != "stream.arrow" or "after row 600" in str(caught.value)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_with_two_columns_of_a_name_is_one_line(tmp_path, name):
    file = table_file(tmp_path / name, pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]))
    with pytest.raises(UserError, match="data: has two columns 'text'"):
        read(file)


def test_batches_go_over_files_and_name_each(tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.csv", "c.txt")]
    put(tmp_path, {"a.jsonl": numbered(3), "b.csv": b"n\n7\n8\n", "c.txt": b"one\n\ntwo\n"})
    found_batches = list(batches(files, 2))
    assert [len(batch) for batch in found_batches] == [2, 2, 2, 1]
    assert [row.file.name[0] for batch in found_batches for row in batch] == [*"aaabbcc"]
    assert {name for batch in found_batches for row in batch for name in row.values} == {"n", "text"}


def test_the_size_of_a_large_file_is_told_by_its_beginning(tmp_path):
    rows = [{"text": "word " * 40, "n": number} for number in range(20_000)]
    contents = {
        "a.jsonl": lines(rows),
        "b.json": json.dumps(rows).encode(),
        "c.json": json.dumps({"data": rows}).encode(),
    }
    put(tmp_path, {**contents, "d.csv": b"text,n\n" + b"".join(b"%s,%d\n" % (b"word " * 40, n) for n in range(20_000))})
    for file in sorted(tmp_path.iterdir()):
        count, text_bytes = estimate([file])
        assert count == pytest.approx(20_000, rel=0.05)
        assert text_bytes == file.stat().st_size
    put(tmp_path, {"e.jsonl.gz": PACK["gz"](lines(numbered(100)))})
    assert estimate([tmp_path / "e.jsonl.gz"]) == (100, len(lines(numbered(100))))


WORDS = "All human beings are born free and equal in dignity and rights. " * 16
MEASURE = """
import resource, sys
from pathlib import Path
from cordee.data.rows import batches
def used(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
next(batches([Path(sys.argv[1])]))
before, count, last = used(), 0, 0
for batch in batches([Path(sys.argv[1])]):
    count += len(batch)
    assert batch[0].number > last
    last = batch[-1].number
print(count, used() - before)
"""


@pytest.mark.parametrize("suffix", ["jsonl", "json", "objects.json", "csv", "parquet", "arrow", "jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    count, file = 100_000, tmp_path / f"a.{suffix}"
    texts = [f"{number} {WORDS}" for number in range(count)]
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), file, compression="none", use_dictionary=False)
    elif suffix == "arrow":
        table_file(tmp_path / "a.arrow", pa.table({"text": texts}))
    elif suffix == "csv":
        file.write_text("text\n" + "\n".join(texts))
    else:
        begin, between, end = {"json": ("[", ", ", "]"), "objects.json": ("{\n", "\n", "")}.get(suffix, ("", "\n", ""))
        objects = between.join(f'{{"text": "{text}"}}' for text in texts)
        content = (f'{{\n"text": ""}}\n{objects}' if suffix == "objects.json" else begin + objects + end).encode()
        file.write_bytes(PACK["gz"](content) if suffix.endswith("gz") else content)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows, megabytes = map(int, done.stdout.split())
    assert rows == count + (suffix == "objects.json")
    assert megabytes < 50  # of 100


def test_numbers_of_lines_grow_in_objects_over_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\n".join(map(pretty, numbered(30_000))))
    rows = read(tmp_path / "a.json")
    assert all(later.number - row.number == 4 for row, later in pairwise(rows))
    assert rows[-1].values == numbered(30_000)[-1]
