"""Measures checkpoints with lm-eval on task files that read local data, all in one engine.

    python -m eval.benchmark --config benchmarks.yaml

lm-eval's own results and samples stand untouched in `lm_eval/<model>/`; `results.json` has its figures in one table.
"""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from cordee import files, model_folder, worker
from cordee.config import Config as Keys
from cordee.config import Engine, Execution, Input
from cordee.cost import Cost
from cordee.stage import Context

if TYPE_CHECKING:
    from eval.harness import Task


VERSION = 1
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""A name that can be a folder's."""


class Config(Keys):
    """Which checkpoints are measured, on what."""

    models: dict[Name, Input] = Field(min_length=1)
    """Checkpoints of one shape by name, in the order in which they were trained."""
    tasks: list[Input] = Field(min_length=1)
    """lm-eval task files; their content is part of the identity."""
    data: dict[str, Input] = Field(default={})
    """The files that the tasks read, by the names that stand in their `data_files`."""
    limit: int | None = Field(default=None, ge=1)
    """Documents per task, spread evenly over the languages; all of them if not given."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest request, in tokens: a longer one is an error, never cut; without it, all positions of the model. Longer
    documents, where a task scores whole documents, are read in windows of this length."""
    engine: Engine = "auto"
    """`auto` takes vLLM where it is installed; which one measured stands beside the results."""
    batch_size: Execution[int] = Field(default=16, ge=1)
    """Requests at once, where transformers measures."""


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """The parameters of the models; how much they read depends on the data."""
    models = [model_folder.cost(path, f"models.{name}", given) for name, path in config.models.items()]
    return Cost(parameters=models[0].parameters)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Measure each model that an earlier run has not measured, and write `results.json`."""
    from cordee.compute import engine
    from eval import backends, harness

    engine.require_one_shape(dict(config.models))
    length = engine.longest_request(next(iter(config.models.values())), config.max_length)
    name = engine.choose(config.engine)
    if name == "transformers":
        context.note("vLLM is not used: transformers measures")
    measured: dict[str, Any] = {}
    requests = 0

    def watch(coming: int) -> None:
        nonlocal requests
        if context.stop_requested():
            context.stop(f"model {len(measured)} of {len(config.models)}")
        context.progress(len(measured), len(config.models), "models", requests=requests)
        requests += coming

    with tempfile.TemporaryDirectory(prefix="cordee-") as cache:
        tasks = [harness.read_task(path, config.data, Path(cache)) for path in config.tasks]
        table = {
            "engine": engine.describe(name),
            "models": [],
            "tasks": {task.name: task.about for task in tasks},
        }
        models = backends.Models(name, length, config.batch_size, context.seed, watch=watch)
        measured |= _earlier(context.out, table["engine"], tasks)
        for model, folder in config.models.items():
            watch(0)
            if model in measured:
                continue
            lm = models.open(folder)
            began = time.monotonic()
            row = harness.measure(lm, model, tasks, config.limit, context)
            measured[model] = {"name": model, **row, "seconds": round(time.monotonic() - began, 3)}
            files.write_json(context.out / "results.json", {**table, "models": list(measured.values())})
            context.note(f"{model}: {harness.said(row['results'])}")
    last = list(measured.values())[-1]
    return {"rows": sum(row["documents"] for row in measured.values()), "engine": name, **last["headline"]}


def _earlier(out: Path, engine: dict[str, str], tasks: "list[Task]") -> dict[str, Any]:
    """The rows of an earlier run that was stopped, where the same engine measured and lm-eval's files are there."""
    from eval import harness

    path = out / "results.json"
    table = files.read_json(path) if path.exists() else {"engine": engine, "models": []}
    rows = table["models"] if table["engine"] == engine else []
    return {row["name"]: row for row in rows if harness.is_whole(out / "lm_eval" / row["name"], tasks)}


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
