"""What a folder's documents are, which columns they carry, and what becomes of rows that can't be documents."""

import bz2
import datetime as dt
import gzip
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cordee.errors import UserError
from cordee.stage import Context
from pretrain.corpus import Config, cost, run
from pretrain.data.folder import find_files


def lines(documents):
    return "".join(json.dumps(item) + "\n" for item in documents).encode()


def documents(first=0, count=20, **columns):
    return [{"text": f"Document {index} tells of something.", **columns} for index in range(first, first + count)]


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else lines(content))
    return folder


def build(tmp_path, source, **keys):
    config = Config.model_validate({"source": str(source), "holdout_fraction": 0.3, **keys})
    out = tmp_path / "out"
    tmp_path.mkdir(exist_ok=True)
    metrics = run(config, Context(out=out, seed=1, events=tmp_path / "events.jsonl"))
    table = pa.concat_tables([pq.read_table(out / f"{split}.parquet") for split in ("train", "heldout")])
    return metrics, table, json.loads((out / "corpus.json").read_text())


def notes(tmp_path):
    rows = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    return [row["text"] for row in rows if row["event"] == "note"]


def error_of(tmp_path, source, **keys):
    with pytest.raises(UserError) as caught:
        build(tmp_path, source, **keys)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def zst(content):
    with pa.BufferOutputStream() as buffer:
        with pa.CompressedOutputStream(buffer, "zstd") as stream:
            stream.write(content)
        return buffer.getvalue().to_pybytes()


PROSE = b"Apache License\n\nVersion 2.0, January 2004\n\nTERMS AND CONDITIONS\n"
FOLDERS = {
    "licence beside gz": (["part-0.jsonl.gz", "part-1.jsonl.gz"], ["LICENSE.txt"]),
    "licences beside text": (
        ["a.txt", "b/c.txt"],
        ["COPYING.txt", "license-mit.txt", "README.de.txt", "LICENSES/x.txt"],
    ),
    "compressed readme": (["a.txt.gz"], ["NOTICE.txt.gz", "readme.txt"]),
    "hidden": (
        ["a.jsonl"],
        [".ipynb_checkpoints/a-checkpoint.jsonl", ".a.jsonl", ".cache/b/c.parquet", "x/.y/z.jsonl"],
    ),
    "of the hub": (["data/train.jsonl"], ["README.md", "dataset_infos.json", ".gitattributes", "LICENSE"]),
    "saved by datasets": (["a.arrow"], ["dataset_info.json", "state.json", "dataset_dict.json"]),
    "notes beside data": (["a.jsonl"], ["urls.txt", "statistics.json", "sub/words.txt"]),
    "json lines of c4": (["c4.00000.json.gz"], ["info.json"]),
    "plain json": (["a.json"], ["b.txt"]),
    "prose with such words": (["state_of_the_union.txt", "notice_to_all.txt", "copyright_law.txt"], []),
    "other kinds": (["A.JSONL"], ["a.csv", "_SUCCESS", "a.jsonl.lz4", "a.parquet.gz"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_describes_a_corpus_is_no_part_of_it(tmp_path, name):
    read, skipped = FOLDERS[name]
    put(tmp_path, dict.fromkeys([*read, *skipped], b""))
    found = find_files(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found.documents] == sorted(read)
    assert sorted(
        path.relative_to(tmp_path).as_posix() for paths in found.skipped.values() for path in paths
    ) == sorted(skipped)


def test_a_licence_does_not_become_the_corpus_and_what_is_not_read_is_said(tmp_path):
    files = {"p0.jsonl.gz": gzip.compress(lines(documents())), "LICENSE.txt": PROSE, ".x/p0.jsonl": documents(50)}
    metrics, table, _ = build(tmp_path, put(tmp_path / "c", files))
    assert sorted(table["text"].to_pylist()) == sorted(item["text"] for item in documents())
    assert (metrics["files"], metrics["files_not_read"]) == (1, 2)
    assert notes(tmp_path)[0] == (
        f"reads 1 file of {tmp_path}/c: p0.jsonl.gz; not read: 1 hidden (.x/p0.jsonl), "
        "1 licence or readme (LICENSE.txt) (the key files chooses others)"
    )


def test_patterns_say_which_files_are_read(tmp_path):
    source = put(tmp_path / "c", {"a.jsonl": documents(), "b.txt": b"Notes.\n", "d/e.jsonl": documents(50, 5)})
    metrics, _, _ = build(tmp_path, source, files=["d/*.jsonl", "*.txt"])
    assert metrics["rows"] + metrics["heldout_rows"] == 6
    assert "no file matches 'train/*'" in error_of(tmp_path / "x", source, files=["train/*"])
    put(source, {"f.csv": b""})
    assert "f.csv (by '*.csv') can't be read" in error_of(tmp_path / "x", source, files=["*.csv"])
    assert "files: is a single file" in error_of(tmp_path / "x", source / "a.jsonl", files=["a"])


@pytest.mark.parametrize("pattern", ["/etc/*", "../*.jsonl", ""])
def test_patterns_stay_below_the_folder(tmp_path, pattern):
    with pytest.raises(ValueError, match="leads out of the folder"):
        Config.model_validate({"source": str(tmp_path), "holdout_fraction": 0.1, "files": [pattern]})


def test_a_folder_of_nothing_but_a_licence_is_an_error(tmp_path):
    source = put(tmp_path / "c", {"LICENSE.txt": PROSE, ".git/x.jsonl": documents()})
    assert "file to read, only 1 hidden, 1 licence or readme" in error_of(tmp_path, source)
    with pytest.raises(UserError, match="only 1 hidden"):
        cost(Config.model_validate({"source": str(source), "holdout_fraction": 0.1}), {})


def test_a_file_that_is_named_itself_is_read_whatever_its_name(tmp_path):
    source = put(tmp_path / "c", {"LICENSE.txt": PROSE}) / "LICENSE.txt"
    metrics, _, _ = build(tmp_path, source, holdout_fraction=0.5)
    assert metrics["rows"] + metrics["heldout_rows"] == 3


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, zst])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "txt"])
def test_compressed_files_hold_the_same_documents(tmp_path, pack, kind):
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", zst: "zst"}[pack]
    plain = lines(documents(0, 600)) if kind != "txt" else "\n\n".join(x["text"] for x in documents(0, 600)).encode()
    half = len(plain) // 2
    # as `cat a.gz b.gz` makes them: several compressed parts, one after the other
    source = put(tmp_path / "c", {f"a.{kind}.{suffix}": pack(plain[:half]) + pack(plain[half:])})
    _, table, _ = build(tmp_path, source)
    assert sorted(table["text"].to_pylist()) == sorted(item["text"] for item in documents(0, 600))


@pytest.mark.parametrize("suffix", ["gz", "bz2", "zst"])
def test_a_compressed_file_that_is_cut_off_is_an_error(tmp_path, suffix):
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zst}[suffix]
    source = put(tmp_path / "c", {f"a.jsonl.{suffix}": pack(lines(documents(0, 999)))[:-20]})
    assert f"a.jsonl.{suffix}: source: can't be read to its end" in error_of(tmp_path, source)


def test_an_array_of_objects_and_arrow_files_are_read(tmp_path):
    put(tmp_path / "c", {"a.json": b"\xef\xbb\xbf [\n" + ",\n".join(map(json.dumps, documents())).encode() + b"]"})
    assert build(tmp_path / "a", tmp_path / "c")[1].num_rows == 20
    table = pa.Table.from_pylist(documents(0, 1000, n=1))
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        (tmp_path / name).mkdir()
        with new(str(tmp_path / name / "data.arrow"), table.schema) as writer:
            writer.write_table(table)
        metrics, written, _ = build(tmp_path / f"{name}-out", tmp_path / name)
        assert (metrics["rows"] + metrics["heldout_rows"], written.schema.field("n").type) == (1000, pa.int64())


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
