"""What becomes of rows that can't be documents, and of documents that repeat each other."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import build, documents, error_of, lines, notes, put

ODD = [
    ("empty text", b'{"text": ""}'),
    ("empty text", b'{"text": " \\n "}'),
    ("null text", b'{"text": null}'),
    ("text of type int", b'{"text": 3}'),
    ("no 'text'", b'{"texts": "a"}'),
    ("no UTF-8", b'{"text": "\xff"}'),
    ("half a character (a lone surrogate)", b'{"text": "\\ud800"}'),
    ("half a character (a lone surrogate)", b'{"text": "a", "title": ["\\uDFFF"]}'),
    ("no JSON object", b'["text"]'),
    ("no JSON object", b'{"text": "a"'),
    ("no JSON object", b'{"text": "a", "n": ' + b"1" * 5000 + b"}"),
    ("no JSON object", b'{"text": ' + b"[" * 100_000 + b"}"),
]


@pytest.mark.parametrize(("problem", "line"), ODD)
def test_a_row_that_can_be_no_document_is_an_error_or_dropped_and_counted(tmp_path, problem, line):
    source = put(tmp_path, {"a.jsonl": lines(documents()) + line + b"\n"}) / "a.jsonl"
    told = f"a.jsonl: bad_rows: 1 of 21 rows can't be a document: 1 {problem} (line 21); "
    said = error_of(tmp_path, source)
    assert told in said
    assert said.endswith('"bad_rows: drop" leaves them out')
    metrics, table, summary = build(tmp_path, source, bad_rows="drop")
    assert (table.num_rows, metrics["bad_rows_dropped"]) == (20, 1)
    assert summary["bad_rows"][problem]["rows"] == 1
    assert summary["bad_rows"][problem]["samples"][0]["place"] == "line 21"


def test_an_emoji_that_is_escaped_is_no_half_character(tmp_path):
    source = put(tmp_path, {"a.jsonl": documents(title="\U0001f600")}) / "a.jsonl"
    assert b"\\ud83d" in source.read_bytes()
    assert build(tmp_path, source)[1]["title"].to_pylist() == ["\U0001f600"] * 20


def test_an_error_tells_of_all_odd_rows_at_once(tmp_path):
    odd = [b'{"text": ""}'] * 5 + [b'{"text": null}'] + [b"{"]
    files = {"a.jsonl": lines(documents()) + b"\n".join(odd) + b"\n", "b.jsonl": b'{"text": " "}\n'}
    said = error_of(tmp_path, put(tmp_path / "c", files))
    assert (
        "8 of 28 rows can't be documents: 6 empty text (a.jsonl line 21, a.jsonl line 22, a.jsonl line 23, …), "
        "1 null text (a.jsonl line 26), 1 no JSON object (a.jsonl line 27)"
    ) in said
    assert (
        sum(row["event"] == "note" for row in map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines()))
        == 1
    )
    _, _, summary = build(tmp_path, tmp_path / "c", bad_rows="drop")
    assert summary["bad_rows"]["empty text"] == {
        "rows": 6,
        "samples": [{"place": f"a.jsonl line {number}", "row": '{"text": ""}'} for number in (21, 22, 23)],
    }


def test_odd_rows_of_text_files_and_parquet_are_named_too(tmp_path):
    text = put(tmp_path, {"a.txt": b"good\n\nZ\xfcrich\n\nmore\n\nand more"}) / "a.txt"
    assert "1 of 4 rows can't be a document: 1 no UTF-8 (line 3)" in error_of(tmp_path, text)
    assert build(tmp_path, text, bad_rows="drop", holdout_fraction=0.5)[1].num_rows == 3
    raw = pa.array([b"good", b"Z\xfcrich", None, b" "] + [b"text %d" % n for n in range(400)], pa.binary())
    title = pa.array([b"good"] * 403 + [b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw.view(pa.string()), "title": title}), tmp_path / "a.parquet")
    said = error_of(tmp_path / "b", tmp_path / "a.parquet")
    assert "2 no UTF-8 (row 2, row 404)" in said
    assert "1 null text (row 3)" in said
    assert "1 empty text (row 4)" in said
    metrics, table, _ = build(tmp_path / "b", tmp_path / "a.parquet", bad_rows="drop")
    assert (table.num_rows, metrics["bad_rows_dropped"]) == (400, 4)
    assert set(table["title"].to_pylist()) == {"good"}


def test_rows_that_are_all_odd_are_an_error_whatever_the_key_says(tmp_path):
    source = put(tmp_path, {"a.jsonl": [{"body": "a"}] * 3}) / "a.jsonl"
    said = error_of(tmp_path, source, bad_rows="drop")
    assert "holds no document: 3 of 3 rows can't be documents: 3 no 'text' (line 1, line 2, line 3)" in said
    assert said.endswith("known: body")


def test_the_same_file_twice_is_said(tmp_path):
    data = lines(documents(0, 30))
    files = {
        "data.jsonl": data,
        "data.jsonl.gz": gzip.compress(data),
        "more.jsonl": documents(25, 30) + documents(40, 2),
    }
    metrics, _, summary = build(tmp_path, put(tmp_path / "c", files))
    assert summary["duplicates"] == {"within_files": 2, "between_files": 35}
    assert metrics["duplicate_rows"] == 37
    assert notes(tmp_path)[1] == (
        "37 documents repeat the text of another and are kept: 2 within a file, 30 of the 30 of data.jsonl.gz are "
        "in data.jsonl too, 5 of the 32 of more.jsonl are in data.jsonl too"
    )


def test_documents_are_counted_once_where_none_repeats(tmp_path):
    metrics, _, summary = build(tmp_path, put(tmp_path / "c", {"a.jsonl": documents(), "b.jsonl": documents(50)}))
    assert (metrics["duplicate_rows"], summary["duplicates"]) == (0, {"within_files": 0, "between_files": 0})


def test_a_language_that_is_no_text_is_counted_by_its_json(tmp_path):
    _, table, summary = build(tmp_path, put(tmp_path, {"a.jsonl": documents(language=["de", "fr"])}) / "a.jsonl")
    assert list(summary["languages"]) == ['["de", "fr"]']
    assert table["language"].to_pylist() == [["de", "fr"]] * 20
