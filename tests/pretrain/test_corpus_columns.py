"""Which columns a corpus carries, with which types, and that any of them can say what is held out."""

import datetime as dt
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import build, documents, notes, put

STRUCT = {"name": "web", "tags": ["a"], "year": 2020}


def test_every_column_is_carried_with_its_type(tmp_path):
    columns = {
        "url": "https://x",
        "source": STRUCT,
        "article": "LONDON --",
        "score": 0.5,
        "n": 3,
        "ok": True,
        "none": None,
    }
    source = put(tmp_path / "c", {"a.jsonl": documents(**columns)})
    _, table, summary = build(tmp_path, source)
    assert all({**row, "text": ""} == {"text": "", **columns} for row in table.to_pylist())
    assert summary["columns"] == {
        "url": "string",
        "source": "struct<name: string, tags: list<item: string>, year: int64>",
        "article": "string",
        "score": "double",
        "n": "int64",
        "ok": "bool",
        "none": "null",
    }


def test_parquets_own_types_are_kept(tmp_path):
    day, amount = dt.date(1948, 12, 10), pa.array([1, 2, 3] * 7, pa.decimal128(9, 2))
    columns = {
        "text": pa.array([f"text {n}" for n in range(21)], pa.large_string()),
        "day": pa.array([day] * 21),
        "at": pa.array([10**18 + 1] * 21, pa.timestamp("ns", "UTC")),
        "amount": amount,
        "small": pa.array([7] * 21, pa.uint8()),
        "raw": pa.array([b"\xff"] * 21),
        "licence": pa.array(["CC0"] * 21).dictionary_encode(),
        "map": pa.array([[("a", 1)]] * 21, pa.map_(pa.string(), pa.int32())),
    }
    (tmp_path / "c").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "c" / "a.parquet")
    _, table, summary = build(tmp_path, tmp_path / "c")
    for name in ("day", "at", "amount", "small", "raw", "map"):
        assert table[name].type == columns[name].type
        assert sorted(map(str, table[name].to_pylist())) == sorted(map(str, columns[name].to_pylist()))
    assert summary["licences"] == {"CC0": 21}


def test_types_are_widened_over_files_and_what_no_type_holds_is_json_text(tmp_path):
    one = documents(0, 10, n=1, id=7, mixed=1, meta={}, tags=[], big=2**60 + 1, deep={"a": 1})
    other = documents(50, 10, n=0.5, id=10**50, mixed="x", meta={}, tags=["t"], big=0.5, deep={"a": 2.5, "b": "c"})
    source = put(tmp_path / "c", {"a.jsonl": one, "b.jsonl": other, "d.jsonl": documents(90, 5)})
    _, table, summary = build(tmp_path, source)
    kinds = {"n": "double", "tags": "list<item: string>", "deep": "struct<a: double, b: string>"}
    assert summary["columns"] == {**dict.fromkeys(["id", "mixed", "meta", "big"], "JSON text"), **kinds}
    rows = {row["text"]: row for row in table.to_pylist()}
    for document in (*one, *other):
        row = rows[document["text"]]
        for name in ("id", "mixed", "meta", "big"):
            assert json.loads(row[name]) == document[name]
        assert (row["n"], row["tags"], row["deep"]["a"]) == (document["n"], document["tags"], document["deep"]["a"])
    assert rows[documents(90, 1)[0]["text"]]["id"] is None
    assert [note for note in notes(tmp_path) if "JSON text" in note] == [
        "written as JSON text, since no one type holds their values: id, mixed, meta, big"
    ]


def test_nan_is_carried(tmp_path):
    source = put(tmp_path / "c", {"a.jsonl": documents(score=math.nan)})
    assert b"NaN" in (source / "a.jsonl").read_bytes()
    _, table, _ = build(tmp_path, source)
    assert table["score"].type == pa.float64()
    assert all(map(math.isnan, table["score"].to_pylist()))


def test_objects_with_hundreds_of_keys_are_json_text(tmp_path):
    rows = [{"text": f"text {n}", "seen": {f"https://example.org/{n}/{m}": m for m in range(20)}} for n in range(30)]
    _, table, summary = build(tmp_path, put(tmp_path / "c", {"a.jsonl": rows}))
    assert summary["columns"] == {"seen": "JSON text"}
    assert {row["text"]: json.loads(row["seen"]) for row in table.to_pylist()} == {x["text"]: x["seen"] for x in rows}


@pytest.mark.parametrize(
    ("values", "wanted", "held"),
    [
        (["a", "b"], "b", 10),
        ([1, 2], 2, 10),
        ([0.5, 1.5], 1.5, 10),
        ([True, False], True, 10),
        ([1, True], True, 10),
        ([{"a": 1}, "b"], "b", 10),
    ],
)
def test_any_column_can_say_what_is_held_out(tmp_path, values, wanted, held):
    rows = [{**item, "column": values[index % 2]} for index, item in enumerate(documents())]
    source = put(tmp_path / "c", {"a.jsonl": rows})
    metrics, _, _ = build(tmp_path, source, holdout_fraction=0.0, holdout={"column": [wanted]})
    assert metrics["heldout_rows"] == held


def test_a_date_is_held_out_by_how_it_is_spelled(tmp_path):
    days = [dt.date(2020, 1, 1), dt.date(2021, 1, 1)] * 10
    (tmp_path / "c").mkdir()
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(20)], "day": days}), tmp_path / "c" / "a.parquet")
    metrics, _, _ = build(tmp_path, tmp_path / "c", holdout_fraction=0.0, holdout={"day": ["2021-01-01"]})
    assert metrics["heldout_rows"] == 10
