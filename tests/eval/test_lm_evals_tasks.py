"""lm-eval's own tasks, groups and tags by name: found without importing it, with data in the hub's layout."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from figures import figure

from cordee import plan, recipe, sandbox
from cordee.artifact import Store
from cordee.errors import UserError
from cordee.stage import Context
from eval import benchmark
from eval.measuring import batches, catalog, code_eval, task_files

LM_EVAL = "lm_eval/tasks/"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return hub.make(tmp_path_factory.mktemp("hub"))


def config(checkpoints, data_dir, tasks, **keys):
    """A benchmark of the first checkpoint."""
    given = {"models": {"first": str(checkpoints["first"])}, "tasks": tasks, "engine": "transformers", "limit": 2}
    return benchmark.Config.model_validate({**given, "data_dir": str(data_dir), **keys})


def files_of(asked):
    return [str(task.task).rpartition(LM_EVAL)[2] for task in asked.tasks]


@pytest.mark.long
def test_the_index_is_lm_evals_own(tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    catalog.entries.cache_clear()
    found = catalog.entries()
    own = TaskManager().task_index
    assert found.keys() == own.keys()
    kinds = {"PY_TASK": "task"}
    for name, entry in own.items():
        assert found[name].kind == kinds.get(entry.kind.name, entry.kind.name.lower()), name
        assert found[name].file == str(entry.yaml_path or ""), name
        if found[name].kind == "tag":
            assert set(found[name].members) == entry.tags, name
    catalog.entries.cache_clear()
    assert catalog.entries() == found, "from the cache"
    (cache,) = tmp_path.rglob("*.json")
    cache.write_text(cache.read_text()[:-1000])
    catalog.entries.cache_clear()
    assert catalog.entries() == found, "a cache that is damaged is made again"


def test_names_tags_and_patterns_stand_for_files(checkpoints, data_dir):
    asked = config(checkpoints, data_dir, ["gsm8k", "xcopa_i*", {"task": "xcopa", "num_fewshot": 1, "limit": 1}])
    assert files_of(asked) == [
        "gsm8k/gsm8k.yaml", "xcopa/default_id.yaml", "xcopa/default_it.yaml", "xcopa/_xcopa.yaml"
    ]  # fmt: skip
    assert [task.limit for task in asked.tasks] == [2, 2, 2, 1]
    assert set(asked.datasets) == {"openai/gsm8k", "cambridgeltl/xcopa"}
    again = benchmark.Config.model_validate(asked.model_dump(mode="json"))
    assert again == asked


def test_a_tag_is_all_its_tasks(checkpoints, data_dir):
    known = catalog.entries()["mgsm_direct"]
    assert known.kind == "tag"
    absent = config(checkpoints, data_dir, ["mgsm_direct"]).datasets["juletxara/mgsm"]
    assert str(absent) == "hub:datasets/juletxara/mgsm", "to be fetched"
    assert {(language, ()) for language in ("de", "en", "zh")} < absent.reads
    mgsm = str(data_dir / "openai" / "gsm8k")
    asked = config(checkpoints, data_dir, ["mgsm_direct"], datasets={"juletxara/mgsm": mgsm})
    assert len(asked.tasks) == len(known.members)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["gsm8kk"], r"tasks: no task, group, tag or file 'gsm8kk'; did you mean 'gsm8k'\?"),
        (["nothing_*"], r"tasks: no task is named like 'nothing_\*'"),
        ([{"task": "gsm8k", "fewshots": 3}], r"tasks\.0\.fewshots: unknown key"),
        ([{"num_fewshot": 3}], r"tasks\.0\.task: missing"),
        ([5], r"tasks\.0: "),
        (["hub:datasets/org/tasks/a.yaml"], r"tasks: 'hub:\S+': task files are code, and not fetched"),
        (["absent.yaml"], r"tasks\.0\.task: no file or folder 'absent\.yaml'"),
    ],
)
def test_what_can_not_be_asked_is_one_line_of_the_plan(tasks, message, checkpoints, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = {"uses": "eval.benchmark", "models": {"m": str(checkpoints["first"])}, "tasks": tasks}
    document = {"name": "mine", "stages": {"bench": {**stage, "data_dir": str(data_dir)}}}
    (tmp_path / "mine.yaml").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"mine\.yaml: stages\.bench\." + message) as caught:
        plan.make(recipe.load(tmp_path / "mine.yaml", ()), Store(tmp_path / "runs"))
    assert "\n" not in str(caught.value)


def test_an_edit_of_what_a_group_or_its_data_holds_is_another_identity(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = hub.make(tmp_path / "hub")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "all.yaml").write_text("group: all\ntask: [one, xcopa_it]\n")
    (tmp_path / "mine" / "one.yaml").write_text("include: one_base\ntask: one\ndataset_path: openai/gsm8k\n")
    (tmp_path / "mine" / "one_base").write_text("doc_to_text: !function utils.text\n")
    (tmp_path / "mine" / "utils.py").write_text("def text(doc): return doc['question']\n")
    stage = {"uses": "eval.benchmark", "models": {"m": str(checkpoints["first"])}, "tasks": ["mine/all.yaml"]}
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "stages": {"bench": {**stage, "data_dir": str(own)}}}))

    def fingerprint():
        return plan.make(recipe.load(tmp_path / "r.yaml", ()), Store(tmp_path / "runs")).stage("bench").fingerprint

    seen = {fingerprint()}
    for path in (*sorted((tmp_path / "mine").iterdir()), own / "cambridgeltl" / "xcopa" / "README.md"):
        with path.open("a") as file:
            file.write("# other\n")
        seen.add(fingerprint())
    assert len(seen) == 6
    names = task_files.contents(Path("mine/all.yaml")).tasks
    assert list(names) == ["one", "xcopa_it"]


def test_a_plan_that_names_tasks_imports_no_lm_eval(checkpoints, data_dir, tmp_path):
    stage = {"uses": "eval.benchmark", "models": {"m": str(checkpoints["first"])}, "tasks": ["gsm8k", "xcopa"]}
    (tmp_path / "r.yaml").write_text(
        json.dumps({"name": "r", "stages": {"bench": {**stage, "data_dir": str(data_dir)}}})
    )
    code = (
        "import sys; from pathlib import Path; from cordee import plan, recipe; from cordee.artifact import Store;"
        "plan.make(recipe.load(Path('r.yaml'), ()), Store(Path('runs')));"
        "print(sorted({'lm_eval', 'torch', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_filters_shots_and_groups_have_figures_of_their_own(checkpoints, data_dir, tmp_path):
    short = {"num_fewshot": 0, "gen_kwargs": {"max_gen_toks": 8}}
    tasks = [
        "xcopa",
        {"task": "xcopa_it", "num_fewshot": 1},
        {"task": "gsm8k", "metric": "exact_match,flexible-extract", **short},
        {"task": "gsm8k", "apply_chat_template": True, **short},
    ]
    (tmp_path / "out").mkdir()
    context = Context(out=tmp_path / "out", seed=3, events=tmp_path / "events.jsonl")
    metrics = benchmark.run(config(checkpoints, data_dir, tasks), context)
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    assert {(told["task"], told["asked"], told["shots"]) for told in row["tasks"] if told["is_asked"]} == {
        ("xcopa", "plain", 0), ("xcopa_it", "1-shot", 1), ("gsm8k", "0-shot-sampled", 0),
        ("gsm8k", "chat-0-shot-sampled", 0),
    }  # fmt: skip
    in_group = [told["is_group"] for told in row["tasks"] if told["asked"] == "plain"]
    assert sorted(in_group) == [False] * 11 + [True]
    own = [figure(row, f"xcopa_{language}") for language in hub.XCOPA]
    assert figure(row, "xcopa")["value"] == pytest.approx(sum(one["value"] for one in own) / len(own))
    assert [one["documents"] for one in own] == [2] * 11
    filters = {one["filter"] for one in row["results"] if one["task"] == "gsm8k"}
    assert filters == {"strict-match", "flexible-extract"}
    assert row["documents"] == 2 * (11 + 1 + 2)
    assert set(metrics) == {"rows", "engine", "xcopa.acc", "xcopa_it.acc", "gsm8k.exact_match"}
    places = {path.parent.name for path in (tmp_path / "out" / "lm_eval" / "first").rglob("samples_gsm8k_*")}
    assert places == {"0-shot-sampled", "chat-0-shot-sampled"}


def test_of_a_group_without_a_figure_its_tasks_are_shown(checkpoints, data_dir, tmp_path):
    (tmp_path / "suite.yaml").write_text("group: suite\ntask: [xcopa_it, {group: inner, task: [xcopa_et, xcopa_ht]}]\n")
    (tmp_path / "out").mkdir()
    context = Context(out=tmp_path / "out", seed=3, events=tmp_path / "events.jsonl")
    metrics = benchmark.run(config(checkpoints, data_dir, [str(tmp_path / "suite.yaml")], limit=1), context)
    assert metrics.keys() == {"rows", "engine", "xcopa_it.acc", "xcopa_et.acc", "xcopa_ht.acc"}


def test_groups_that_name_each_other_end(tmp_path):
    (tmp_path / "one.yaml").write_text("group: one\ntask: [two, gsm8k]\n")
    (tmp_path / "two.yaml").write_text("group: two\ntask: [one]\n")
    found = task_files.contents(tmp_path / "one.yaml")
    assert (set(found.groups), set(found.tasks)) == ({"one", "two"}, {"gsm8k"})


def test_data_sets_of_one_name_are_told_apart(checkpoints, data_dir, tmp_path):
    """`datasets` takes the second for the first, whose readme file is the same."""
    other = tmp_path / "me" / "gsm8k"
    shutil.copytree(data_dir / "openai" / "gsm8k", other)
    (file,) = other.rglob("test-*.parquet")
    rows = pq.read_table(file).to_pylist()
    pq.write_table(pa.Table.from_pylist([{**row, "question": f"Mine: {row['question']}"} for row in rows]), file)
    task = Path(catalog.entries()["gsm8k"].file).read_text().replace("task: gsm8k", "task: mine")
    (tmp_path / "mine.yaml").write_text(task.replace("openai/gsm8k", str(other)))
    asked = config(checkpoints, data_dir, ["gsm8k", str(tmp_path / "mine.yaml")])
    (tmp_path / "out").mkdir()
    (batch,) = batches.make(asked, tmp_path / "out", tmp_path / "cache")
    first, second = (batch.loaded["tasks"][name].eval_docs[0]["question"] for name in ("gsm8k", "mine"))
    assert second == f"Mine: {first}"


OWN = """
task: mine
test_split: test
doc_to_text: question
doc_to_target: answer
metric_list: [{metric: !function judge.right, aggregation: mean, higher_is_better: true}]
"""
METRIC = "import evaluate\nmetric = evaluate.load('code_eval')\n"


def refused(checkpoints, data_dir, tmp_path, tasks, **keys):
    (tmp_path / "out").mkdir()
    context = Context(out=tmp_path / "out", seed=3, events=tmp_path / "events.jsonl")
    with pytest.raises(UserError) as caught:
        benchmark.run(config(checkpoints, data_dir, tasks, **keys), context)
    assert not (tmp_path / "out" / "lm_eval").exists(), "nothing is measured before"
    return str(caught.value)


def test_a_task_that_runs_what_models_write_has_to_be_confirmed(checkpoints, data_dir, tmp_path):
    said = refused(checkpoints, data_dir, tmp_path, ["humaneval"])
    assert said.endswith("humaneval runs code that the models write; `confirm_unsafe_code: true` if you accept that")


@pytest.mark.parametrize(
    ("unsafe", "module", "confirmed", "message"),
    [
        (
            "unsafe_code: true\n",
            "",
            True,
            "tasks: mine runs code that the models write by functions of its own, outside",
        ),
        ("", METRIC, False, "tasks: a task computes code_eval, which runs code that the models write; `confirm_unsafe"),
    ],
)
def test_no_task_runs_what_models_write_outside_of_the_sandbox(
    unsafe, module, confirmed, message, checkpoints, data_dir, tmp_path
):
    (tmp_path / "mine.yaml").write_text(f"{OWN}dataset_path: {data_dir}/openai/gsm8k\n{unsafe}")
    (tmp_path / "judge.py").write_text(f"{module}def right(references, predictions): return 1.0\n")
    tasks = [str(tmp_path / "mine.yaml")]
    assert message in refused(checkpoints, data_dir, tmp_path, tasks, confirm_unsafe_code=confirmed)


def test_what_models_write_is_run_in_the_sandbox_without_the_hub(checkpoints, data_dir, tmp_path, monkeypatch):
    tasks = ["humaneval", "humaneval_single_line_infilling"]
    (tmp_path / "out").mkdir()
    context = Context(out=tmp_path / "out", seed=3, events=tmp_path / "events.jsonl")
    keys = {"confirm_unsafe_code": True, "limit": 4, "gen_kwargs": {"max_gen_toks": 4}}
    metrics = benchmark.run(config(checkpoints, data_dir, tasks, **keys), context)
    assert metrics["humaneval_single_line_infilling.pass@1"] == 0.5
    assert metrics["humaneval.pass@1"] == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    assert not any("Landlock" in note for notes in row["notes"].values() for note in notes)
    asked = config(checkpoints, data_dir, tasks, **keys)
    (batch,) = batches.make(asked, tmp_path / "out", tmp_path, confirm_unsafe_code=True)
    monkeypatch.setattr(sandbox, "check", lambda: False)
    (said,) = code_eval.notes(batch.loaded["tasks"]["humaneval"])
    assert "could read files" in said
