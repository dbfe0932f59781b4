"""Artifacts that a report was not given, that are gone, or that are damaged: each is named."""

import shutil
from pathlib import Path

import fake_store
import manifests
import pytest
from fake_store import change_json, figures

from cordee.errors import Fault
from eval.reporting.records import open_record

ROOT = Path(__file__).resolve().parents[2]


def test_what_was_not_listed_is_left_out_and_named(report):
    folder = report(("sft",), ())
    shown, page = figures(folder), (folder / "index.html").read_text(encoding="utf-8")
    assert shown["benchmarks"] == shown["samples"] == shown["languages"] == []
    assert 'id="benchmarks"' not in page
    assert any("No certificates" in line for line in shown["limits"])


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda folder: (folder / "manifest.json").write_text("{")])
def test_an_ancestor_that_is_gone_or_damaged_is_named(report, store, damage):
    damage(store["chats"])
    shown = figures(report())
    assert shown["provenance"]["missing"] == ["quickstart/chats@1"]
    assert any("quickstart/chats@1" in line for line in shown["limits"])


def test_another_artifact_in_an_ancestors_place_is_a_fault(report, store):
    manifests.change(store["chats"], fingerprint="0" * 64)
    with pytest.raises(Fault, match=r"chats@1: is not the quickstart/chats@1 that quickstart/sft@1 was made from"):
        report()


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("benchmark", "results.json"),
        ("samples", "samples.jsonl"),
        ("base", "metrics.jsonl"),
        ("corpus", "corpus.json"),
        ("prove-masks", "certificate.json"),
    ],
)
def test_a_file_that_differs_from_its_hash_or_its_shape_is_a_fault_that_names_it(report, store, stage, file):
    path = store[stage] / file
    path.write_bytes(path.read_bytes()[:-9] + b"\n")
    with pytest.raises(Fault, match=rf"{file}: its content differs from the manifest's SHA-256"):
        report()
    fake_store.rehash(store[stage])
    with pytest.raises(Fault, match=rf"{file}.*: (can't be used|line \d+ is no JSON)"):
        report()
    path.unlink()
    with pytest.raises(Fault, match=rf"{file}: can't be read"):
        report()


def test_a_value_that_is_announced_and_missing_is_a_fault(report, store):
    change_json(store["benchmark"], "results.json", lambda d: d["models"][3]["results"].pop(0))
    with pytest.raises(Fault, match=r"results.json: models.sft.results: has no acc,none of language_identification"):
        report()


def test_a_folder_that_is_no_artifact_is_a_fault(tmp_path):
    with pytest.raises(Fault, match="lies in no artifact"):
        open_record(tmp_path)


def test_a_place_inside_an_artifact_is_that_artifact(store):
    (store["base"] / "checkpoints" / "100").mkdir(parents=True)
    assert open_record(store["base"] / "checkpoints" / "100").name == "quickstart/base@1"
