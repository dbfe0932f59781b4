"""Which files of a folder hold a corpus's documents, and of which split and subset."""

import bz2
import gzip
import json

import pyarrow as pa
import pytest
from corpora import build, documents, error_of, lines, notes, put

from cordee import hashes
from cordee.data.folder import find_files, splits_shown
from cordee.errors import UserError
from pretrain.corpus import Config, cost


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
    "saved by datasets": (["a.arrow"], ["dataset_info.json", "dataset_dict.json"]),
    "notes beside data": (["a.jsonl", "sub/words.txt"], ["urls.txt", "statistics.json", "languages.csv"]),
    "notes above data": (["data/a.parquet"], ["urls.txt", "statistics.json", "languages.csv"]),
    "text and data in folders": (["books/a.txt", "web/a.parquet"], ["web/urls.txt"]),
    "csv": (["a.csv", "b.tsv"], ["info.json", "notes.txt"]),
    "json lines of c4": (["c4.00000.json.gz"], ["info.json"]),
    "plain json": (["a.json"], ["b.txt"]),
    "prose with such words": (["state_of_the_union.txt", "notice_to_all.txt", "copyright_law.txt"], []),
    "other kinds": (["A.JSONL"], ["a.xlsx", "_SUCCESS", "a.jsonl.lz4", "a.parquet.gz"]),
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


SPLIT_FOLDERS = {
    "of the hub": (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        "2 of train, 1 of test",
    ),
    "all three": (["train.jsonl", "dev.jsonl", "test.jsonl.gz"], "1 of train, 1 of validation, 1 of test"),
    "with a suffix": (["train_sft-0.jsonl", "wiki.VAL.jsonl", "more.jsonl"], "1 of train, 1 of validation"),
    "folders": (["en/training/0.jsonl", "en/training/1.jsonl", "en/eval/0.jsonl"], "2 of train, 1 of test"),
    "the name before its folder": (["train/a.jsonl", "train/validation.jsonl"], "1 of train, 1 of validation"),
    "one split": (["train-0.jsonl", "train-1.jsonl", "more.jsonl"], ""),
    "words that only begin so": (["trains.jsonl", "latest.jsonl", "devices.jsonl", "values.jsonl"], ""),
}


@pytest.mark.parametrize("name", SPLIT_FOLDERS)
def test_names_tell_of_splits(tmp_path, name):
    files, counts = SPLIT_FOLDERS[name]
    source = put(tmp_path / "train" / "test", dict.fromkeys(files, b""))
    said = splits_shown(source, find_files(source))
    told = f"by their names the files are of several splits, all read: {counts} (the key split chooses)"
    assert said == (told if counts else "")


def test_several_splits_are_read_with_one_note_and_without_one_if_they_were_chosen(tmp_path):
    source = put(tmp_path / "c", {"train.jsonl": documents(), "test.jsonl": documents(50, 5), "LICENSE.txt": PROSE})
    metrics, _, _ = build(tmp_path, source)
    assert metrics["rows"] + metrics["heldout_rows"] == 25
    assert [note for note in notes(tmp_path) if "several splits" in note] == [splits_shown(source, find_files(source))]
    build(tmp_path / "b", source, files=["*.jsonl"])
    assert not any("several splits" in note for note in notes(tmp_path / "b"))
    build(tmp_path / "d", source / "train.jsonl")
    assert notes(tmp_path / "d") == []


def test_a_split_is_chosen_by_its_name(tmp_path):
    delimited = gzip.compress(b"text,n\n" + b"".join(b"Text %d,%d\n" % (n, n) for n in range(20)))
    source = put(tmp_path / "c", {"train.jsonl": documents(), "test.csv.gz": delimited})
    metrics, table, _ = build(tmp_path, source, split="test")
    assert {row["text"]: row["n"] for row in table.to_pylist()} == {f"Text {n}": str(n) for n in range(20)}
    assert metrics["files_not_read"] == 1
    assert [note.partition("; not read: ")[2] for note in notes(tmp_path)] == [
        "1 of other splits (train.jsonl) (the key files chooses others)"
    ]
    assert "split: no split 'dev'; known: test, train" in error_of(tmp_path / "x", source, split="dev")
    config = Config.model_validate({"source": str(source), "holdout_fraction": 0.1, "split": "dev"})
    with pytest.raises(UserError, match="no split 'dev'"):
        cost(config, {})
    with pytest.raises(ValueError, match="give one of files, and split or subset"):
        Config.model_validate({"source": str(source), "holdout_fraction": 0.1, "split": "test", "files": ["*"]})


def test_a_subset_is_chosen_by_its_name(tmp_path):
    configs = "".join(f"- {{config_name: {name}, data_files: {name}.jsonl}}\n" for name in ("de", "rm"))
    files = {
        "de.jsonl": documents(),
        "rm.jsonl": documents(50, 7),
        "README.md": f"---\nconfigs:\n{configs}---\n".encode(),
    }
    source = put(tmp_path / "c", files)
    for keys in ({"subset": "rm"}, {"subset": "rm", "split": "train"}):
        metrics, _, _ = build(tmp_path, source, **keys)
        assert metrics["rows"] + metrics["heldout_rows"] == 7
    assert "subset: holds 2 subsets, none of them the default; known: de, rm" in error_of(
        tmp_path / "x", source, split="train"
    )
    metrics, _, _ = build(tmp_path, source)
    assert metrics["rows"] + metrics["heldout_rows"] == 27


def test_patterns_say_which_files_are_read(tmp_path):
    source = put(tmp_path / "c", {"a.jsonl": documents(), "b.txt": b"Notes.\n", "d/e.jsonl": documents(50, 5)})
    metrics, _, _ = build(tmp_path, source, files=["d/*.jsonl", "*.txt"])
    assert metrics["rows"] + metrics["heldout_rows"] == 6
    assert "no file matches 'train/*'" in error_of(tmp_path / "x", source, files=["train/*"])
    put(source, {"f.xlsx": b""})
    assert "f.xlsx (by '*.xlsx') can't be read" in error_of(tmp_path / "x", source, files=["*.xlsx"])
    assert "files: is a single file" in error_of(tmp_path / "x", source / "a.jsonl", files=["a"])


def test_the_files_of_a_linked_folder_are_read_and_hashed_alike(tmp_path):
    source = put(tmp_path / "c", {"a.jsonl": documents()})
    put(tmp_path / "elsewhere", {"b.jsonl": documents(50)})
    (source / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(source)
    for patterns, names in ((None, ["a.jsonl", "train/b.jsonl"]), (["train/*.jsonl"], ["train/b.jsonl"])):
        found = find_files(source, patterns)
        assert [path.relative_to(source).as_posix() for path in found.documents] == names
    with pytest.raises(UserError, match="no file matches"):
        find_files(source, ["train/up/*.jsonl"])  # hashed as a.jsonl
    before = hashes.of_content(source)
    put(tmp_path / "elsewhere", {"b.jsonl": documents(70)})
    assert hashes.of_content(source) != before


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
