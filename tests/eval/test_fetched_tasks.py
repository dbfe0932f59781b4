"""Data sets that lm-eval's tasks read: named by a plan where they are not here, fetched, and read."""

import json
import shutil
from pathlib import Path

import hub
import hub_server
import pyarrow.parquet as pq
import pytest

from cordee import plan, recipe
from cordee.artifact import Store
from cordee.errors import UserError
from eval import benchmark
from eval.measuring import batches

OWN = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: hf://datasets/org/own@main/rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def here(checkpoints, tmp_path, monkeypatch):
    """A recipe that asks tasks, in a folder and with a cache of the test's own."""
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(OWN)
    tasks, models = ["gsm8k", "xcopa_it", "xcopa_et", "own.yaml"], {"m": str(checkpoints["first"])}
    stage = {"uses": "eval.benchmark", "models": models, "tasks": tasks, "engine": "transformers"}
    Path("r.yaml").write_text(json.dumps({"name": "r", "stages": {"bench": stage}}))
    return tmp_path


def planned(*overrides):
    (stage,) = plan.make(recipe.load(Path("r.yaml"), overrides), Store(Path("runs"))).stages
    return stage


def test_what_tasks_read_is_named_fetched_and_read(here, cordee, monkeypatch):
    with pytest.raises(UserError) as caught:
        planned()
    assert str(caught.value) == (
        "r.yaml: not fetched: hub:datasets/org/own@main/rows.jsonl"
        " (stages.bench.data.hf://datasets/org/own@main/rows.jsonl),"
        " hub:datasets/openai/gsm8k (stages.bench.datasets.openai/gsm8k),"
        " hub:datasets/cambridgeltl/xcopa (stages.bench.datasets.cambridgeltl/xcopa);"
        " `cordee fetch r.yaml` fetches what is missing, where there is a network"
    )
    with pytest.raises(UserError, match=r"stages\.bench\.data_dir: no folder 'nowhere'"):
        planned("bench.data_dir=nowhere")
    served = here / "served"
    hub.make(served / "datasets")
    with hub_server.serve(served) as server:
        server.write("datasets/org/own", {"rows.jsonl": json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n"})
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        done = cordee("fetch", "r.yaml")
    assert done.returncode == 0, done.stderr
    read = {name.rpartition("/")[0] for name in server.asked if name.startswith("cambridgeltl")}
    assert read == {f"cambridgeltl/xcopa{below}" for below in ("", "/it", "/et")}, "two of eleven subsets"
    (test,) = served.glob("datasets/openai/gsm8k/main/test-*.parquet")
    questions = pq.read_table(test)["question"].to_pylist()
    shutil.rmtree(served)
    found = planned()
    config = benchmark.Config.model_validate({
        **found.config.model_dump(mode="json"),
        **{kind: {name: str(found.inputs[f"{kind}.{name}"].path) for name in getattr(found.config, kind)}
           for kind in ("data", "datasets")},
    })  # fmt: skip
    (batch,) = batches.make(config, here, here / "cache")
    documents = {name: list(task.eval_docs) for name, task in batch.loaded["tasks"].items()}
    assert {name: len(rows) for name, rows in documents.items()} == {
        "gsm8k": 24, "xcopa_it": 3, "xcopa_et": 3, "own": 1
    }  # fmt: skip
    assert [row["question"] for row in documents["gsm8k"]] == questions


def test_the_revision_that_a_task_names_is_the_one_that_is_fetched(here):
    given = "{data_files: {test: hf://datasets/org/own@main/rows.jsonl}}"
    text = OWN.replace("task: own", "task: pinned").replace("json\n", "org/pinned\n").replace(given, "{revision: v1/a}")
    (here / "pinned.yaml").write_text(text)
    with pytest.raises(UserError, match=r"not fetched: hub:datasets/org/pinned@v1%2Fa \("):
        planned("bench.tasks=[pinned.yaml]")
    (here / "other.yaml").write_text(text.replace("v1/a", "v2").replace("task: pinned", "task: other"))
    with pytest.raises(UserError, match=r"tasks: tasks read two revisions of org/pinned: .*@v1%2Fa and .*@v2; `data"):
        planned("bench.tasks=[pinned.yaml,other.yaml]")


def test_a_folder_of_the_hubs_layout_comes_before_what_was_fetched(here):
    hub.make(here / "hub")
    with pytest.raises(UserError, match=r"not fetched: hub:datasets/org/own@main/rows\.jsonl \([^,]*\); `"):
        planned("bench.data_dir=hub")
    Path("rows.jsonl").write_text("{}\n")
    assert planned("bench.data_dir=hub", "bench.tasks=[gsm8k]").inputs["datasets.openai/gsm8k"].path == Path(
        here / "hub/openai/gsm8k"
    )
