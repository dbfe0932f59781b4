import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fake_store
import manifests
import pytest
from fake_store import change_json, figures

from eval.measuring import statistics
from eval.reporting import comparison, sections
from eval.reporting.records import Corpus, open_record

ROOT = Path(__file__).resolve().parents[2]


def test_the_pipeline_has_every_stage_that_the_listed_ones_depend_on_each_after_its_inputs(report):
    pipeline = [stage["stage"] for stage in figures(report(("merged",)))["pipeline"]]
    assert sorted(pipeline) == ["base", "chats", "corpus", "dpo", "merged", "sft", "tokenizer", "tokens"]
    for earlier, later in (("corpus", "tokens"), ("tokens", "base"), ("base", "sft"), ("chats", "sft"), ("sft", "dpo")):
        assert pipeline.index(earlier) < pipeline.index(later)


def test_the_figures_are_those_of_the_artifacts(report, store):
    result = json.loads((store["benchmark"] / "results.json").read_text(encoding="utf-8"))
    shown = figures(report())
    tables = [table for table in shown["benchmarks"] if table["task"] == "language_identification"]
    for table, metric in zip(tables, ("acc", "acc_norm"), strict=True):
        stored = [row["value"] for model in result["models"] for row in model["results"] if row["metric"] == metric]
        assert [row["value"] for row in table["rows"]] == stored
    table = tables[0]
    assert [row["model"] for row in table["rows"]] == list(fake_store.MODELS)
    first = shown["verdict"][0]
    assert (first["before"], first["after"]) == (table["rows"][0]["value"], table["rows"][-1]["value"])
    heldout = next(curve for curve in shown["curves"] if curve["metric"] == "heldout_bits_per_byte")
    rows = [json.loads(line) for line in (store["base"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert heldout["points"] == [[r["step"], r["heldout_bits_per_byte"]] for r in rows if "heldout_bits_per_byte" in r]
    assert heldout["byte_entropy"] == 4.93
    page = (report() / "index.html").read_text(encoding="utf-8")
    assert f"{100 * first['after']:.1f}%" in page
    assert "5.41 M" in page


def test_a_base_says_its_held_out_bits_per_byte_where_no_benchmark_does(report, store):
    def words():
        return {stage["stage"]: stage["output"] for stage in figures(report(("base",)))["pipeline"]}

    assert words()["base"] == "a language model"
    manifests.change(store["base"], metrics={"heldout_bits_per_byte": 1.31768})
    assert words()["base"] == "a language model, 1.318 bits per held-out byte"


def test_incidents_and_goodput_have_a_section_where_a_stage_tells_them(report, store):
    assert figures(report())["goodput"] == []
    assert "Incidents and goodput" not in (report() / "index.html").read_text(encoding="utf-8")
    text = f"rank 3 (process 71 on n7) is stopped {fake_store.HOSTILE}"
    incident = {"kind": "hang", "text": text, "step": 120, "time": 1.8e9, "lost_s": 75.0}
    seconds = dict.fromkeys(("data", "compile", "checkpoint"), 0.0)
    seconds |= {"productive": 300.0, "start": 25.0, "lost work": 40.0, "hang": 15.0, "restart": 20.0}
    manifests.change(
        store["base"], goodput={"wall_s": 400.0, "seconds": seconds, "attempts": 2, "incidents": [incident]}
    )
    (shown,) = figures(report())["goodput"]
    assert (shown["stage"], shown["share"], shown["attempts"]) == ("base", 0.75, 2)
    page = (report() / "index.html").read_text(encoding="utf-8")
    section = page.partition('<section id="goodput"')[2].partition("</section>")[0]
    assert "75.0%" in section
    assert "rank 3 (process 71 on n7) is stopped &lt;script&gt;" in section
    assert "1 min 15 s" in section


def test_a_corpus_of_one_language_is_in_one_language(report, store):
    change_json(store["corpus"], "corpus.json", lambda told: told.update(languages={"de": told["languages"]["de"]}))
    assert figures(report(("corpus",)))["pipeline"][0]["output"] == "a corpus in 1 language"


def test_documents_without_a_language_have_a_row_and_are_no_language(report, store):
    nameless = {"name": "", "script": ""}
    change_json(store["corpus"], "corpus.json", lambda told: told.update(languages={"": nameless, "de": nameless}))

    def rename(told):
        for model in told["models"]:
            for row in model["results"]:
                row["by_language"] = {"" if tag == "fr" else tag: value for tag, value in row["by_language"].items()}

    change_json(store["benchmark"], "results.json", rename)
    shown = figures(report())
    assert (
        next(stage for stage in shown["pipeline"] if stage["stage"] == "corpus")["output"] == "a corpus in 1 language"
    )
    names = {row["tag"]: row["name"] for group in shown["languages"][0]["groups"] for row in group["languages"]}
    assert (names[""], names["de"], names["it"]) == ("no language", "de", "it")
    change_json(store["corpus"], "corpus.json", lambda told: told.update(languages={"": nameless}))
    assert figures(report(("corpus",)))["pipeline"][0]["output"] == "a corpus"


def test_changes_are_paired_document_by_document(report, store):
    table = next(t for t in figures(report())["benchmarks"] if t["task"] == "heldout_text")
    folder = store["benchmark"] / "lm_eval"
    old, new = (
        [
            json.loads(line)["bits_per_byte"]
            for line in next(folder.glob(f"{name}/*/samples_held*")).open(encoding="utf-8")
        ]
        for name in ("base", "sft")
    )
    bits = [[-score[0] / 0.6931471805599453 for score in scores] for scores in (old, new)]
    expected = statistics.paired_change(*bits, [score[1] for score in old])
    change = table["rows"][3]["change"]
    assert change["paired"]
    assert change["rows"] == 192
    assert change["value"] == pytest.approx(expected.value)
    assert change["standard_error"] == pytest.approx(expected.standard_error)
    assert change["value"] == pytest.approx(table["rows"][3]["value"] - table["rows"][2]["value"])


def test_a_change_is_against_what_the_checkpoint_was_trained_from(report, store):
    """`dpo` from `base`, as `sft` beside it; what no manifest tells is against the row above."""

    def read(key, name):
        return {"key": key, "artifact": f"quickstart/{name}@1", "fingerprint": fake_store.digest(name)}

    def against():
        table = figures(report())["benchmarks"][0]
        values = {row["model"]: row["value"] for row in table["rows"]}
        changes = [row["change"] for row in table["rows"] if row["change"]]
        for row, change in zip(table["rows"][1:], changes, strict=True):
            assert change["value"] == pytest.approx(row["value"] - values[change["against"]])
        return [change["against"] for change in changes]

    above = list(fake_store.MODELS[:-1])
    assert against() == above
    manifests.change(store["benchmark"], inputs=[read(f"models.{name}", name) for name in ("base", "sft", "dpo")])
    assert against() == above
    manifests.change(store["dpo"], inputs=[read("model", "base")])
    assert against() == [*above[:-1], "base"]
    assert "paired, against base" in (report() / "index.html").read_text()


def test_without_languages_there_is_no_section_of_them(report, store):
    def forget(told):
        for model in told["models"]:
            for row in model["results"]:
                row["by_language"] = {"": 0.5}

    change_json(store["benchmark"], "results.json", forget)
    assert figures(report())["languages"] == []


def test_without_sample_rows_a_change_is_unpaired_and_the_report_says_so(report, store):
    shutil.rmtree(store["benchmark"] / "lm_eval")
    change_json(
        store["benchmark"],
        "results.json",
        lambda d: d["models"][1]["results"][2].update(standard_error=None),
    )
    shown = figures(report())
    accuracy, _, bits = shown["benchmarks"]
    rows = accuracy["rows"]
    error = (rows[0]["standard_error"] ** 2 + rows[1]["standard_error"] ** 2) ** 0.5
    assert not rows[1]["change"]["paired"]
    assert rows[1]["change"]["standard_error"] == pytest.approx(error)
    assert bits["rows"][1]["change"]["standard_error"] is None, "the benchmark gave none"
    assert not bits["rows"][1]["change"]["significant"]
    assert any("could not be paired" in line for line in shown["limits"])


@pytest.mark.parametrize("fault", ["other documents", "other values"])
def test_rows_of_other_documents_or_with_another_mean_are_not_paired(report, store, fault):
    path = next((store["benchmark"] / "lm_eval" / "sft").glob("*/samples_lang*"))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[0] |= {"doc_hash": "other"} if fault == "other documents" else {"acc": 1.0 - rows[0]["acc"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fake_store.rehash(store["benchmark"])
    changes = [row["change"] for row in figures(report())["benchmarks"][0]["rows"]]
    assert [change["paired"] for change in changes[1:]] == [True, True, False, False]


def test_a_line_separator_in_a_text_ends_no_line(report, store):
    text = "one\u2028two\u0085three"
    rows = [{"prompt": text, "outputs": {"sft": text}}, {"prompt": "x", "outputs": {"sft": "y"}}]
    (store["samples"] / "samples.jsonl").write_text(fake_store.lines(rows), encoding="utf-8")
    fake_store.rehash(store["samples"])
    for path in (store["benchmark"] / "lm_eval").rglob("samples_*.jsonl"):
        scored = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text(fake_store.lines([{**row, "doc": {"text": text}} for row in scored]), encoding="utf-8")
    fake_store.rehash(store["benchmark"])
    shown = figures(report())
    assert [row["prompt"] for row in shown["samples"][0]["shown"]] == [text, "x"]
    main = [table for table in shown["benchmarks"] if table["is_main"]]
    assert all(row["change"]["paired"] for table in main for row in table["rows"][1:])


def test_answers_without_a_reference_have_no_empty_labels(report, store):
    (store["samples"] / "samples.jsonl").write_text(fake_store.lines([{"prompt": "x", "outputs": {"sft": "y"}}]))
    fake_store.rehash(store["samples"])
    page = (report() / "index.html").read_text(encoding="utf-8")
    (section,) = re.findall(r'<article class="sample">\s*<[^h].*?</article>', page, re.DOTALL)
    assert "<dt>Reference" not in section
    assert not re.search(r"<(p|dt|dd)[^>]*>\s*</", section)
    assert "An answer is correct if" not in page


def test_the_corpuss_licences_stand_on_the_page(report):
    assert "Public domain (1,440 documents)" in (report() / "index.html").read_text(encoding="utf-8")


def test_p_values_are_adjusted_over_the_whole_report(report):
    main = [table for table in figures(report())["benchmarks"] if table["is_main"]]
    changes = [row["change"] for table in main for row in table["rows"] if row["change"]]
    assert len(changes) == 8
    assert [c["adjusted_p_value"] for c in changes] == pytest.approx(statistics.holm([c["p_value"] for c in changes]))


def test_languages_stand_by_script(report):
    table = figures(report())["languages"][0]
    groups = {group["script"]: [row["name"] for row in group["languages"]] for group in table["groups"]}
    assert next(iter(groups)) == "Latin"
    assert groups["Arabic"] == ["Arabic", "Persian"]
    assert list(groups)[-1] == "Scripts of one language"
    assert "Armenian" in groups["Scripts of one language"]
    assert sum(map(len, groups.values())) == 48


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ("romansh. ", "Romansh", True),
        ("Romansh Romansh", "Romansh", False),
        ("", "Romansh", False),
        ("x", None, None),
        ("x", "", None),
        ("x", "x" * 61, None),
    ],
)
def test_an_answer_is_right_if_it_is_the_reference(output, reference, expected):
    assert sections.right(output, reference) is expected


def test_long_curves_are_thinned_and_keep_their_ends():
    points = [[step, float(step)] for step in range(5001)]
    thin = sections.thin(points)
    assert len(thin) == sections.POINTS
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    assert max(b[0] - a[0] for a, b in itertools.pairwise(thin)) <= 13


def test_a_loss_that_is_no_number_is_a_gap(report, store):
    path = store["sft"] / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 81, "loss": NaN}\n', encoding="utf-8")
    fake_store.rehash(store["sft"])
    curve = next(curve for curve in figures(report())["curves"] if curve["stage"] == "sft")
    assert curve["points"][-1][0] == 80


def test_the_recipe_names_artifacts_and_not_fingerprints(report):
    listing = figures(report())["provenance"]["recipe"]
    assert "    - tokens: quickstart/tokens@1\n      weight: 1.0" in listing
    assert "  source: data/udhr.parquet" in listing
    assert '  optimizer:\n    name: "adamw"' in listing


def test_further_metrics_stand_apart_and_count_for_no_adjustment(report):
    folder = report()
    shown = figures(folder)
    main = {(table["task"], table["metric"]): table["is_main"] for table in shown["benchmarks"]}
    assert main == {
        ("language_identification", "acc"): True,
        ("language_identification", "acc_norm"): False,
        ("heldout_text", "bits_per_byte"): True,
    }
    changes = [row["change"] for table in shown["benchmarks"] for row in table["rows"] if row["change"]]
    tested = [change for change in changes if change["adjusted_p_value"] is not None]
    assert len(tested) == 2 * (len(fake_store.MODELS) - 1)
    assert [line["subject"] for line in shown["verdict"]] == ["language_identification", "Held-out text"]
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count("<summary>1 further metric</summary>") == 1
    assert "acc_norm" in page.partition("<summary>")[2]


def test_hostile_text_is_escaped_wherever_it_comes_from(report, store):
    manifests.change(store["sft"], uses=fake_store.HOSTILE, stage=fake_store.HOSTILE)
    change_json(store["benchmark"], "results.json", lambda d: d["models"][0].update(name=fake_store.HOSTILE))
    change_json(store["prove-masks"], "certificate.json", lambda d: d.update(claim=fake_store.HOSTILE))
    change_json(store["corpus"], "corpus.json", lambda d: d["languages"]["de"].update(name=fake_store.HOSTILE))
    page = (report(title=fake_store.HOSTILE) / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") > 20


def test_the_page_is_small_and_the_same_each_time(report):
    first = (report() / "index.html").read_bytes()
    assert len(first) < 300_000
    assert (report() / "index.html").read_bytes() == first


def test_the_report_needs_neither_torch_nor_numpy(store, tmp_path):
    code = f"""
import sys
for name in ("torch", "transformers", "numpy", "pyarrow", "datasets"):
    sys.modules[name] = None
from pathlib import Path
from eval.report import Config, run
from cordee.stage import Context
run(Config(artifacts=[{str(store["benchmark"])!r}]), Context(Path(sys.argv[1]), 0, Path(sys.argv[1]) / "e"))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()


def test_checkpoints_name_their_best_and_worst_languages(store):
    record = open_record(store["benchmark"])
    by_language = comparison.languages([record], open_record(store["corpus"]).read("corpus.json", Corpus))
    card = comparison.checkpoints(comparison.benchmarks([record], []), by_language)[2]
    names = {row["name"]: row["values"][2] for group in by_language[1]["groups"] for row in group["languages"]}
    ranked = sorted(names, key=names.__getitem__)
    assert card["best_languages"] == ranked[:3], "fewest bits per byte"
    assert card["worst_languages"] == ranked[:-4:-1]


def test_what_was_read_and_left_out_is_told_with_samples(report):
    """Counts, share of loss, and the first rows; what data holds is escaped."""
    folder = report()
    (stage,) = json.loads((folder / "report.json").read_text())["training_data"]
    chats, pairs = stage["sources"]
    assert (chats["name"], chats["num_left_out"], round(chats["loss_share"], 3)) == ("chats.jsonl", 3, 0.579)
    assert (pairs["name"], pairs["num_left_out"], pairs["loss_share"]) == ("pairs", 0, None)
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "3 rows of chats.jsonl left out" in page
    assert "chats.jsonl, row 12: message 2" in page
    assert fake_store.HOSTILE not in page
