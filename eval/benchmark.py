"""Measures checkpoints with lm-eval on task files that read local data, all in one engine.

    python -m eval.benchmark --config benchmarks.yaml

lm-eval's own results and samples stand untouched in `lm_eval/<model>/`; `results.json` has its figures in one table.
"""

import time
from typing import Any, Literal

from pydantic import Field

from cordee import files, worker
from cordee.config import Config as Keys
from cordee.config import Execution, Input
from cordee.cost import Cost
from cordee.stage import Context


class Config(Keys):
    """Which checkpoints are measured, on what."""

    models: dict[str, Input] = Field(min_length=1)
    """Checkpoints of one shape by name, in the order of the climb."""
    tasks: list[Input] = Field(min_length=1)
    """lm-eval task files; their content is part of the identity."""
    data: dict[str, Input] = Field(default={})
    """The files that the tasks read, by the names that stand in their `data_files`."""
    limit: int | None = Field(default=None, ge=1)
    """Documents per task; all of them if not given."""
    max_length: int = Field(default=1024, ge=2)
    """Longest request, in tokens; a longer one is an error, never cut."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """`auto` takes vLLM where it is installed; which one measured stands beside the results."""
    batch_size: Execution[int] = Field(default=16, ge=1)
    """Requests at once, where transformers measures."""


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """The parameters of the models; how much they read depends on the data."""
    del config
    return Cost(parameters=next((cost.parameters for cost in given.values() if cost.parameters), None))


def run(config: Config, context: Context) -> dict[str, Any]:
    """Measure each model that an earlier run has not measured, then write `results.json`."""
    from cordee.compute import engine
    from eval import harness

    engine.require_one_shape(dict(config.models))
    tasks = [harness.read_task(path, config.data) for path in config.tasks]
    name = engine.choose(config.engine)
    if name == "transformers":
        context.note("vLLM is not used: transformers measures")
    models = harness.Models(name, config.max_length, config.batch_size, context.seed)
    path = context.out / "results.json"
    kept = files.read_json(path)["models"] if path.exists() else []
    measured = {row["name"]: row for row in kept}
    for done, (model, folder) in enumerate(config.models.items()):
        context.progress(done, len(config.models), "models")
        if model in measured:
            continue
        if context.stop_requested():
            context.stop(f"model {done} of {len(config.models)}")
        began = time.monotonic()
        row = harness.measure(models.open(folder), model, tasks, config.limit, context)
        measured[model] = {"name": model, **row, "seconds": round(time.monotonic() - began, 3)}
        about = {task.name: task.about for task in tasks}
        table = {"engine": engine.describe(name), "models": list(measured.values()), "tasks": about}
        files.write_json(path, table)
    last = list(measured.values())[-1]
    return {"rows": sum(row["documents"] for row in measured.values()), "engine": name, **last["headline"]}


def main() -> None:
    """The door."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
