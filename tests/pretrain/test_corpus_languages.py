"""Documents without a language (null, empty, no such column) are a group of their own, "", wherever languages count."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import build, documents, error_of, notes, put

from pretrain.corpus import Config, cost


def mixed(folder):
    """Ten documents each: in German, with a null, with an empty text, and of a file without the column."""
    files = {
        "a.jsonl": [
            *documents(0, 10, language="de", language_name="Deutsch", script="Latn"),
            *documents(100, 10, language=None, language_name="Deutsch", script="Latn"),
            *documents(200, 10, language=""),
        ],
        "b.jsonl": documents(300, 10),
    }
    return put(folder, files)


def as_parquet(folder):
    """The same documents in Parquet files."""
    for file in sorted(folder.glob("*.jsonl")):
        pq.write_table(pa.Table.from_pylist([*map(json.loads, file.open())]), file.with_suffix(".parquet"))
        file.unlink()
    return folder


def languages_of(table):
    return [language or "" for language in table["language"].to_pylist()]


def test_they_are_counted_as_a_group_without_name_and_script(tmp_path):
    metrics, table, summary = build(tmp_path, mixed(tmp_path / "c"))
    assert languages_of(table).count("") == 30
    assert metrics["languages"] == 1
    group = summary["languages"][""]
    assert (group["name"], group["script"]) == ("", "")
    assert group["train_documents"] + group["heldout_documents"] == 30
    assert group["train_documents"] * group["heldout_documents"] > 0
    assert sum(other["train_bytes"] for other in summary["languages"].values()) == metrics["train_bytes"]


def test_a_selection_of_languages_says_how_many_it_leaves_out(tmp_path):
    source = mixed(tmp_path / "c")
    _, table, _ = build(tmp_path, source, languages=["de"])
    assert table["language"].to_pylist() == ["de"] * 10
    assert '30 documents have no language and are left out (languages: [""] keeps them)' in notes(tmp_path)
    _, table, _ = build(tmp_path / "both", source, languages=["de", ""])
    assert table.num_rows == 40
    assert not any("left out" in note for note in notes(tmp_path / "both"))


def test_an_empty_tag_selects_them(tmp_path):
    metrics, table, summary = build(tmp_path, mixed(tmp_path / "c"), languages=[""])
    assert languages_of(table) == [""] * 30
    assert (metrics["languages"], list(summary["languages"])) == (0, [""])
    said = error_of(tmp_path / "x", put(tmp_path / "d", {"a.jsonl": documents(language="de")}), languages=[""])
    assert "languages: every document has a language" in said


def test_an_empty_value_holds_them_out(tmp_path):
    keys = {"holdout_fraction": 0.0, "holdout": {"language": [""]}}
    metrics, _, summary = build(tmp_path, mixed(tmp_path / "c"), **keys)
    assert (metrics["rows"], metrics["heldout_rows"]) == (10, 30)
    assert (summary["languages"]["de"]["heldout_documents"], summary["languages"][""]["train_documents"]) == (0, 0)
    keys["holdout"] = {"language": ["de"]}
    metrics, _, _ = build(tmp_path / "b", tmp_path / "c", **keys)
    assert (metrics["rows"], metrics["heldout_rows"]) == (30, 10)


@pytest.mark.parametrize(
    "keys",
    [
        {"languages": ["de"], "holdout_fraction": 0.3},
        {"languages": [""], "holdout_fraction": 0.3},
        {"languages": ["de", ""], "holdout": {"language": [""]}},
        {"holdout": {"language": [""]}},
        {"holdout": {"language": ["de"]}},
    ],
)
def test_the_cost_counts_them_as_the_stage_does(tmp_path, keys):
    source = as_parquet(mixed(tmp_path / "c"))
    config = Config.model_validate({"source": str(source), **keys})
    metrics, _, _ = build(tmp_path, source, **{"holdout_fraction": 0.0, **keys})
    rows = metrics["rows"]
    if "holdout_fraction" in keys:
        rows = round((rows + metrics["heldout_rows"]) * (1 - keys["holdout_fraction"]))
    assert cost(config, {}).rows == rows


def test_a_corpus_without_any_language_has_none(tmp_path):
    metrics, _, summary = build(tmp_path, put(tmp_path / "c", {"a.jsonl": documents(language=None)}))
    assert (metrics["languages"], list(summary["languages"])) == (0, [""])
    assert summary["columns"] == {"language": "null"}
