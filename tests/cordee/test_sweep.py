"""A recipe over several values of its keys."""

import json
import re

import pytest

from cordee import recipe, sweep
from cordee.artifact import Store
from cordee.errors import UserError


def test_what_variants_share_is_made_once_and_each_has_a_row(cordee, brook, tmp_path):
    given = ("--over", "pool.text=a,bcd", "--over", "pool.number=1,2.5", "--metric", "pool.tokens")
    done = cordee("sweep", brook, *given)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "runs/brook").glob("*@*")) == [
        *(f"pool@{number}" for number in (1, 2, 3, 4)), "spring@1"
    ]  # fmt: skip
    assert "variant 3 of 4: pool.text=bcd, pool.number=1\n" in done.stdout
    table = [line.split() for line in done.stdout.splitlines()[-5:]]
    assert table == [
        ["pool.text", "pool.number", "pool.tokens"],
        ["a", "1", "1"],
        ["a", "2.5", "1"],
        ["bcd", "1", "3"],
        ["bcd", "2.5", "3"],
    ]
    again = cordee("sweep", brook, *given)
    assert "published" not in again.stdout
    assert [line.split() for line in again.stdout.splitlines()[-5:]] == table


def test_a_variant_that_fails_does_not_end_the_others(cordee, brook):
    given = ("--in-step", "--over", "pool.text=a,b", "--over", "pool.trouble=fault,''", "--metric", "pool.rows")
    done = cordee("sweep", brook, *given)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert re.search(r"1 of 2 variants failed: variant 1: .*the pipe burst", done.stderr)
    assert [line.split() for line in done.stdout.splitlines()[-2:]] == [["a", "fault"], ["b", "1"]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--over", "pool.text"), "--over: 'pool.text' is no key=value,value"),
        (("--over", "pool.text="), "--over: 'pool.text=' is no key=value,value"),
        (("--over", "pool.text=a,a"), "pool.text: has a value twice"),
        (("--over", "pol.text=a,b"), "no stage 'pol'; did you mean 'pool'?"),
        (("--over", "pool.number=1,-1"), "stages.pool.number: Input should be greater than 0"),
        (("--in-step", "--over", "pool.text=a,b", "--over", "pool.number=1"), "pool.text has 2, pool.number has 1"),
        (("--over", "pool.text=[a"), "is no YAML value"),
    ],
)
def test_a_mistake_in_any_variant_is_one_line_and_nothing_runs(cordee, brook, tmp_path, given, said):
    done = cordee("sweep", brook, *given)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    assert not (tmp_path / "runs").exists()


def test_lists_texts_and_numbers_are_values(brook):
    (only,) = sweep.variants(brook, [], ["pool.text='1e-4'"])
    assert only.values == ("1e-4",)
    assert only.recipe.stages[1].config.text == "1e-4"
    assert [one.values for one in sweep.variants(brook, [], ["pool.number=1e-4,2"])] == [("0.0001",), ("2",)]
    with pytest.raises(UserError, match=r"stages\.pool\.text: Input should be a valid string"):
        sweep.variants(brook, [], ["pool.text=[a],[b]"])


def test_without_names_a_trainings_loss_and_a_reports_main_figures_are_shown(brook, tmp_path, cordee):
    given = ["pool.text=a,b"]
    assert cordee("sweep", brook, "--over", *given).returncode == 0
    store = Store(tmp_path / "runs")
    plans = [one.plan(store) for one in sweep.variants(brook, [], given)]
    assert sweep.results(plans) == ([], [[], []])
    row = {"model": "pool", "value": 0.5}
    tables = [{"task": "gsm8k", "is_main": True, "rows": [row]}, {"task": "other", "is_main": False, "rows": [row]}]
    for place, one in enumerate(plans):
        folder = one.stage("pool").artifact.path
        (folder / "report.json").write_text(json.dumps({"benchmarks": tables}))
        one.stage("pool").artifact.manifest.metrics["loss"] = 1.0 + place
        one.stage("spring").artifact.manifest.metrics["loss"] = 9.0
    assert sweep.results(plans) == (["pool.loss", "gsm8k pool"], [[1.0, 0.5], [2.0, 0.5]])
    assert recipe.load(brook).stages[1].name == "pool"
