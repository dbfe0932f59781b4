"""Which files are of a split: told by a hub's header, by a data set that `datasets` saved, or by names."""

import json

import datasets
import pytest
from odd_files import numbered, put, read

from cordee.data.folder import find_files, find_splits
from cordee.errors import UserError


def names(source, **keys):
    return [path.relative_to(source).as_posix() for path in find_files(source, **keys).documents]


def by_split(source, name=None):
    return {
        split: [path.relative_to(source).as_posix() for path in files]
        for split, files in find_splits(source, name).items()
    }


def error_of(source, **keys):
    with pytest.raises(UserError) as caught:
        find_files(source, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{source}")


NAMED = {
    "of the hub": (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        {"train": 2, "test": 1},
    ),
    "of ultrachat": (
        [f"data/{split}-00000-of-00001-a1b2.parquet" for split in ("test_gen", "test_sft", "train_gen", "train_sft")],
        {"test_gen": 1, "test_sft": 1, "train_gen": 1, "train_sft": 1},
    ),
    "of c4": (["en/c4-train.00000-of-01024.json.gz", "en/c4-validation.0.json.gz"], {"train": 1, "validation": 1}),
    "words": (["dev.csv", "test.csv", "train.csv", "more.csv"], {"train": 1, "validation": 1, "test": 1, "": 1}),
    "folders": (["eval/0.jsonl", "training/0.jsonl", "training/1.jsonl"], {"train": 2, "test": 1}),
    "one, and others": (["chats.jsonl", "more/chats.jsonl", "test.jsonl"], {"train": 2, "test": 1}),
    "none": (["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"], {"": 2}),
}


@pytest.mark.parametrize("name", NAMED)
def test_names_tell_of_splits(tmp_path, name):
    files, counts = NAMED[name]
    put(tmp_path, dict.fromkeys(files, b""))
    assert {split: len(found) for split, found in find_splits(tmp_path).items()} == counts
    for split in filter(None, counts):
        assert len(names(tmp_path, split=split)) == counts[split]


def test_a_split_is_read_by_any_word_for_it(tmp_path):
    put(tmp_path, {"train.jsonl": numbered(2), "dev.jsonl": numbered(1), "notes.txt": b"x"})
    for word in ("validation", "dev", "val"):
        found = find_files(tmp_path, split=word)
        assert [path.name for path in found.documents] == ["dev.jsonl"]
        assert {reason: [path.name for path in paths] for reason, paths in found.skipped.items()} == {
            "beside data files": ["notes.txt"],
            "of other splits": ["train.jsonl"],
        }
    assert error_of(tmp_path, split="trian") == ": split: no split 'trian'; did you mean 'train'?"
    assert error_of(tmp_path, split="test") == ": split: no split 'test'; known: train, validation"
    assert "files: chooses by itself: give one of files, and split" in error_of(
        tmp_path, split="train", patterns=["*.jsonl"]
    )
    assert "no subset 'main'; the key is for folders whose README.md names" in error_of(tmp_path, name="main")


def test_where_nothing_tells_of_splits_all_is_train(tmp_path):
    put(tmp_path, {"a.jsonl": numbered(1), "b.jsonl": numbered(1)})
    assert names(tmp_path, split="train") == ["a.jsonl", "b.jsonl"]
    assert find_files(tmp_path / "a.jsonl", split="train").documents == [tmp_path / "a.jsonl"]
    assert "no split 'test'; no name of a file or folder tells of splits" in error_of(tmp_path, split="test")
    assert "no split 'test'" in error_of(tmp_path / "a.jsonl", split="test")


HEADER = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*.parquet
  - {split: dev, path: [main/d*.parquet, "main/extra/**"]}
- config_name: no
  data_files: norsk/*.jsonl
- config_name: socratic
  data_dir: socratic
- {config_name: years, data_files: ["old/*.json", "new/**/*.json"]}
---

# A data set
"""
HUB = [
    *("main/train-0.parquet", "main/train-1.parquet", "main/d.parquet", "main/extra/x.parquet", "main/extra/a.txt"),
    "main/extra/.cache/x.parquet",
    *("norsk/a.jsonl", "norsk/b.txt", "socratic/train.jsonl", "socratic/test.jsonl", "old/b.json", "new/1/a.json"),
    "other/train.parquet",
]


def hub(folder, header=HEADER):
    return put(folder, {**dict.fromkeys(HUB, b""), "README.md": header.encode()})


def test_a_header_names_subsets_and_the_files_of_their_splits(tmp_path):
    source = hub(tmp_path / "train")
    assert by_split(source, "main") == {
        "train": ["main/train-0.parquet", "main/train-1.parquet"],
        "dev": ["main/d.parquet", "main/extra/a.txt", "main/extra/x.parquet"],
    }
    assert by_split(source, "no") == {"train": ["norsk/a.jsonl"]}  # YAML 1.2, in which no is no boolean
    assert by_split(source, "socratic") == {"train": ["socratic/train.jsonl"], "test": ["socratic/test.jsonl"]}
    assert by_split(source, "years") == {"train": ["old/b.json", "new/1/a.json"]}
    assert names(source, name="main", split="validation") == by_split(source, "main")["dev"]
    assert names(source, name="socratic") == ["socratic/train.jsonl", "socratic/test.jsonl"]
    assert len(names(source)) == len(HUB) - 3  # all but notes beside data and what is hidden


def test_a_subset_has_to_be_named_where_there_is_no_default(tmp_path):
    source = hub(tmp_path)
    known = "; known: main, no, socratic, years"
    assert error_of(source, split="train") == f": subset: holds 4 subsets, none of them the default{known}"
    assert error_of(source, name="mian") == ": subset: no subset 'mian'; did you mean 'main'?"
    assert "split: no split 'test'; known: dev, train" in error_of(source, name="main", split="test")
    for header in (
        HEADER.replace("socratic\n", "default\n", 1),
        HEADER.replace("dir: ", "dir: socratic\n  default: true #"),
    ):
        assert names(hub(tmp_path, header), split="train") == ["socratic/train.jsonl"]
    only = HEADER[: HEADER.index("- config_name: no")] + "---\n"
    assert names(hub(tmp_path, only), split="train") == ["main/train-0.parquet", "main/train-1.parquet"]


HEADERS = {
    "configs: [a": "README.md: its header is no valid YAML",
    "configs: [{config_name: a, data_files: [{split: train}]}]": "README.md: configs.a: data_files is no pattern",
    "configs: [{config_name: a, data_files: 3}]": "README.md: configs.a: data_files is no pattern",
    "configs: [{config_name: a, data_files: /etc/*}]": "the header's pattern '/etc/*' can't be followed",
    "configs: [{config_name: a, data_files: '**.json'}]": "the header's pattern '**.json' can't be followed",
    "configs: [{config_name: a, data_files: ../*}]": "split: no split 'train'",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_can_not_be_followed_is_one_line(tmp_path, header):
    assert HEADERS[header] in error_of(hub(tmp_path, f"---\n{header}\n---\n"), split="train")


@pytest.mark.parametrize(
    "header", ["# No header", "---\n---\n", "---\nlicense: mit\n---\n", "---\nconfigs: main\n---\n"]
)
def test_without_subsets_in_the_header_names_tell(tmp_path, header):
    put(tmp_path, {"train.jsonl": b"", "test.jsonl": b"", "README.md": header.encode()})
    assert names(tmp_path, split="train") == ["train.jsonl"]


@pytest.fixture
def saved(tmp_path):
    """A data set that was shuffled, then saved in three files."""
    found = datasets.Dataset.from_list(numbered(300)).shuffle(seed=1).select(range(250))
    found.save_to_disk(tmp_path / "saved", num_shards=3)
    return tmp_path / "saved", found.to_list()


def test_a_saved_data_set_is_read_in_its_order(saved):
    folder, rows = saved
    assert [row.values for row in read(*find_files(folder).documents)] == rows
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    put(folder, {"cache-0a1b.arrow": b"left by map()", "dataset.txt": b"notes"})
    found = find_files(folder)
    assert [path.name for path in found.documents] == [f"data-0000{n}-of-00003.arrow" for n in (2, 1, 0)]
    assert [path.name for path in found.skipped["not of the data set that is saved here"]] == ["cache-0a1b.arrow"]
    assert [row.values["n"] for row in read(*found.documents)][-1] == rows[83]["n"]
    assert names(folder.parent, split="train") == [f"saved/data-0000{n}-of-00003.arrow" for n in (2, 1, 0)]


STATES = {
    "gone": ({"_data_files": [{"filename": "data-9.arrow"}]}, "_data_files: there is no data-9.arrow"),
    "indices": (
        {"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]},
        "_indices_data_files: the rows are chosen and ordered by indices.arrow, which is not read; load it",
    ),
    "no files": ({"_data_files": None}, "state.json: names no data files"),
    "a list": ([], "state.json: names no data files"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_saved_data_set_whose_state_can_not_be_followed_is_one_line(saved, name):
    state, told = STATES[name]
    (saved[0] / "state.json").write_text(json.dumps(state))
    assert told in error_of(saved[0])
    (saved[0] / "state.json").write_text("{")
    assert "state.json: can't be read as JSON" in error_of(saved[0])


def test_a_saved_dictionary_of_data_sets_holds_splits(tmp_path):
    splits = {name: datasets.Dataset.from_list(numbered(20, first)) for name, first in (("train", 0), ("gsw", 20))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    assert [*find_splits(tmp_path)] == ["train", "gsw"]
    for name, first in (("train", 0), ("gsw", 20)):
        assert [row.values for row in read(*find_files(tmp_path, split=name).documents)] == numbered(20, first)
    assert len(read(*find_files(tmp_path).documents)) == 40
    assert "no split 'test'; known: gsw, train" in error_of(tmp_path, split="test")
    (tmp_path / "dataset_dict.json").write_text("[]")
    assert "dataset_dict.json: names no splits" in error_of(tmp_path, split="train")
