"""The corpus stage: what is kept, what is held out, and that nothing broken passes."""

import json
import math
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from cordee.errors import Stopped, UserError
from cordee.stage import Context
from pretrain.corpus import Config, cost, run
from pretrain.data import reading

UDHR = Path(__file__).parents[2] / "data" / "udhr.parquet"


def rows(articles=10, languages=("de", "rm")):
    """Documents of several languages, each language with the same articles."""
    return [
        {
            "text": f"Artikel {article} auf {language}: " + "wörtlich " * (article + 1),
            "language": language,
            "language_name": {"de": "Deutsch", "rm": "Rumantsch"}[language],
            "script": "Latn",
            "article": article,
            "source": f"https://example.org/{language}",
            "licence": "CC0-1.0" if language == "de" else "",
        }
        for language in languages
        for article in range(articles)
    ]


def parquet(folder, documents, name="source.parquet"):
    pq.write_table(pa.Table.from_pylist(documents), folder / name)
    return folder / name


def jsonl(folder, documents, name="source.jsonl"):
    (folder / name).write_text("".join(json.dumps(item) + "\n" for item in documents), encoding="utf-8")
    return folder / name


def build(folder, source, out="out", seed=0, **keys):
    config = Config.model_validate({"source": str(source), **keys})
    metrics = run(config, Context(out=folder / out, seed=seed, events=folder / "events.jsonl"))
    return metrics, read(folder / out / "train.parquet"), read(folder / out / "heldout.parquet")


def read(file):
    return pq.read_table(file).to_pylist()


def error_of(folder, source, **keys):
    """The one line of the user error that the stage ends with; nothing is published on the way."""
    with pytest.raises(UserError) as caught:
        build(folder, source, **(keys or {"holdout_fraction": 0.5}))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_articles_are_held_out_and_nothing_else_is_lost(tmp_path):
    documents = rows()
    metrics, train, heldout = build(tmp_path, parquet(tmp_path, documents), holdout={"article": [8, 9]})
    assert {item["article"] for item in heldout} == {8, 9}
    assert train == [item for item in documents if item["article"] < 8]
    assert heldout == [item for item in documents if item["article"] >= 8]
    assert (metrics["rows"], metrics["heldout_rows"], metrics["duplicates_dropped"]) == (16, 4, 0)


def test_corpus_json_counts_documents_bytes_licences_and_sources(tmp_path):
    metrics, train, heldout = build(tmp_path, parquet(tmp_path, rows()), holdout={"article": [9]})
    summary = json.loads((tmp_path / "out" / "corpus.json").read_text(encoding="utf-8"))
    assert summary["languages"]["rm"] == {
        "name": "Rumantsch",
        "script": "Latn",
        "train_documents": 9,
        "train_bytes": sum(len(item["text"].encode()) for item in train if item["language"] == "rm"),
        "heldout_documents": 1,
        "heldout_bytes": sum(len(item["text"].encode()) for item in heldout if item["language"] == "rm"),
    }
    assert summary["licences"] == {"CC0-1.0": 10, "not stated": 10}
    assert summary["sources"] == 2
    assert metrics["heldout_bytes"] == sum(len(item["text"].encode()) for item in heldout)
    counts = Counter(b"".join(item["text"].encode() for item in heldout))
    total = counts.total()
    entropy = -sum(count / total * math.log2(count / total) for count in counts.values())
    assert summary["heldout_byte_entropy"] == pytest.approx(entropy, abs=1e-12)


def test_entropy_of_two_equally_frequent_bytes_is_one_bit(tmp_path):
    source = jsonl(tmp_path, [{"text": "other", "article": 1}, {"text": "abab", "article": 2}])
    build(tmp_path, source, holdout={"article": [2]})
    assert json.loads((tmp_path / "out" / "corpus.json").read_text())["heldout_byte_entropy"] == pytest.approx(1.0)


def test_only_the_languages_asked_for_are_kept(tmp_path):
    _, train, heldout = build(tmp_path, parquet(tmp_path, rows()), holdout={"article": [9]}, languages=["rm"])
    assert {item["language"] for item in train + heldout} == {"rm"}


def test_the_split_by_fraction_depends_on_text_and_seed_and_not_on_order(tmp_path):
    documents = [{"text": f"document {index}"} for index in range(400)]
    one = build(tmp_path, jsonl(tmp_path, documents), holdout_fraction=0.25)[2]
    turned = build(tmp_path, jsonl(tmp_path, documents[::-1], "turned.jsonl"), "b", holdout_fraction=0.25)[2]
    other_seed = build(tmp_path, tmp_path / "source.jsonl", "c", seed=1, holdout_fraction=0.25)[2]
    assert {item["text"] for item in one} == {item["text"] for item in turned}
    assert {item["text"] for item in one} != {item["text"] for item in other_seed}
    assert 70 <= len(one) <= 130  # 100 expected, standard deviation 8.7


def test_a_text_that_is_held_out_is_dropped_from_training_and_counted(tmp_path):
    documents = [*rows(), {**rows()[9], "article": 3}]
    metrics, train, heldout = build(tmp_path, parquet(tmp_path, documents), holdout={"article": [9]})
    assert metrics["duplicates_dropped"] == 1
    assert not {item["text"] for item in train} & {item["text"] for item in heldout}
    assert "1 training documents dropped" in (tmp_path / "events.jsonl").read_text()


def test_training_that_is_all_held_out_elsewhere_is_an_error(tmp_path):
    source = jsonl(tmp_path, [{"text": "same", "article": 1}, {"text": "same", "article": 2}])
    assert "every training document's text is held out too" in error_of(tmp_path, source, holdout={"article": [2]})


def test_parquet_jsonl_and_text_hold_the_same_documents(tmp_path):
    texts = [f"Zeile {index}\nzweite Zeile ä" for index in range(50)]
    parquet(tmp_path, [{"text": text} for text in texts])
    jsonl(tmp_path, [{"text": text} for text in texts])
    (tmp_path / "source.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n\n".join(texts).replace("\n", "\r\n").encode())
    for suffix in (".parquet", ".jsonl", ".txt"):
        assert [item["text"] for item in reading.documents(tmp_path / f"source{suffix}")] == texts


def test_the_same_run_twice_and_over_what_a_kill_left_writes_the_same_bytes(tmp_path):
    source = parquet(tmp_path, rows())
    build(tmp_path, source, holdout={"article": [9]})
    (tmp_path / "b").mkdir()
    for name in ("train.parquet", "heldout.parquet", "corpus.json"):
        (tmp_path / "b" / name).write_bytes(b"half" * 10_000)
    build(tmp_path, source, "b", holdout={"article": [9]})
    for name in ("train.parquet", "heldout.parquet", "corpus.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_stop_is_heard(tmp_path):
    (tmp_path / "stop").touch()
    with pytest.raises(Stopped):
        build(tmp_path, parquet(tmp_path, rows()), holdout={"article": [9]})


@pytest.mark.parametrize(
    "keys",
    [{}, {"holdout": {"article": [1]}, "holdout_fraction": 0.1}, {"holdout": {"article": []}}, {"languages": []}],
)
def test_a_config_that_says_not_exactly_one_way_to_hold_out_is_refused(tmp_path, keys):
    with pytest.raises(ValidationError):
        Config.model_validate({"source": str(tmp_path), **keys})


def test_an_unknown_language_names_the_nearest(tmp_path):
    source = parquet(tmp_path, [{**item, "language": "de-1996"} for item in rows(languages=["de"])])
    line = error_of(tmp_path, source, holdout={"article": [9]}, languages=["de-1966"])
    assert "languages" in line
    assert "did you mean 'de-1996'?" in line
    assert error_of(tmp_path, source, holdout={"article": [9]}, languages=["de"]).endswith("there is de-1996")
    untagged = jsonl(tmp_path, [{"text": "a"}])
    assert error_of(tmp_path, untagged, holdout_fraction=0.5, languages=["de"]).endswith("have no language tag")


def test_a_held_out_value_that_no_document_has_is_an_error(tmp_path):
    source = parquet(tmp_path, rows())
    assert "holdout.article: no document has article = 99" in error_of(tmp_path, source, holdout={"article": [9, 99]})
    assert "holdout.artcle" in error_of(tmp_path, source, holdout={"artcle": [9]})


def test_an_empty_side_is_an_error(tmp_path):
    source = parquet(tmp_path, rows())
    assert "holds out all 20" in error_of(tmp_path, source, holdout={"article": list(range(10))})
    assert "holdout_fraction: holds out none of 20" in error_of(tmp_path, source, holdout_fraction=1e-9)


@pytest.mark.parametrize("name", ["e.parquet", "e.jsonl", "e.txt"])
def test_an_empty_corpus_is_an_error(tmp_path, name):
    if name == "e.parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_text("\n")
    assert f"{name}: source: holds no document" in error_of(tmp_path, tmp_path / name)


def test_a_source_that_is_no_corpus_is_an_error(tmp_path):
    (tmp_path / "a.xlsx").write_text("text\nhello\n")
    (tmp_path / "empty").mkdir()
    assert "a.xlsx: source: is no .parquet" in error_of(tmp_path, tmp_path / "a.xlsx")
    assert "empty: source: the folder holds no" in error_of(tmp_path, tmp_path / "empty")
    assert "there is no such file" in error_of(tmp_path, tmp_path / "gone.parquet")


def test_a_missing_text_column_names_file_and_nearest(tmp_path):
    line = error_of(tmp_path, parquet(tmp_path, [{"texts": "a"}]))
    assert "source.parquet: source: has no column 'text'" in line
    assert "did you mean 'texts'?" in line
    line = error_of(tmp_path, jsonl(tmp_path, [{"text": "a"}, {"texts": "b"}]))
    assert "source.jsonl: bad_rows: 1 of 2 rows can't be a document: 1 no 'text' (line 2)" in line
    assert "did you mean 'texts'?" in line


def test_parquet_cut_in_half_or_damaged_inside_names_the_file(tmp_path):
    whole = parquet(tmp_path, [{"text": f"text number {n} " * 50} for n in range(2000)]).read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "hole.parquet").write_bytes(whole[:100] + bytes(len(whole) // 2) + whole[100 + len(whole) // 2 :])
    assert "half.parquet: source: can't be read as Parquet" in error_of(tmp_path, tmp_path / "half.parquet")
    assert "hole.parquet: source: can't be read as Parquet" in error_of(tmp_path, tmp_path / "hole.parquet")


def test_the_cost_is_known_before_the_text_is_read(tmp_path):
    source = parquet(tmp_path, [*rows(), {"text": "no article", "language": "rm"}])
    config = Config.model_validate({"source": str(source), "holdout": {"article": [8, 9]}, "languages": ["rm"]})
    estimate = cost(config, {})
    metrics = build(tmp_path, source, holdout={"article": [8, 9]}, languages=["rm"])[0]
    assert estimate.rows == metrics["rows"] == 9
    assert estimate.tokens == pytest.approx(metrics["train_bytes"] / 3, rel=0.5)


def test_the_cost_of_a_broken_source_is_a_user_error(tmp_path):
    source = parquet(tmp_path, rows())
    (tmp_path / "half.parquet").write_bytes(source.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"half\.parquet"):
        cost(Config.model_validate({"source": str(tmp_path / "half.parquet"), "holdout_fraction": 0.1}), {})


def test_the_shipped_corpus_splits_by_article(tmp_path):
    heldout_articles, languages = [25, 26, 27, 28, 29, 30], ["rm-sursilv", "de"]
    _, train, heldout = build(tmp_path, UDHR, holdout={"article": heldout_articles}, languages=languages)
    assert {(item["language"], item["article"]) for item in heldout} == {
        (language, article) for language in languages for article in heldout_articles
    }
    assert {item["language"] for item in train} == set(languages)
    assert all(item["licence"] and item["source"] for item in train + heldout)
