"""Measures checkpoints with lm-eval on task files that read local data, all in one engine.

    python -m eval.benchmark --config benchmarks.yaml

lm-eval's own results and samples stand untouched in `lm_eval/<model>/`; `results.json` has its figures in one table.
"""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from cordee import files, model_folder, worker
from cordee.config import Config as Keys
from cordee.config import Engine, Execution, Input
from cordee.cost import Cost
from cordee.stage import Context

if TYPE_CHECKING:
    from eval.harness import Task


VERSION = 2
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
    """Documents per task, spread evenly over the languages where they have a column `language`, else the first; all of
    them if not given."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest request, in tokens: a longer one is an error, never cut; without it, all positions of the model. Longer
    documents, where a task scores whole documents, are read in windows of this length."""
    engine: Engine = "auto"
    """`auto` takes vLLM where it is installed; which one measured stands beside the results."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What is computed in. `auto`, as the `lm_eval` command has it: the stored dtype, but bfloat16 where vLLM is given
    float32; it stands beside the results."""
    enforce_eager: bool | None = None
    """Whether vLLM runs without compiling, which moves log-probabilities a little; if not given, on a CPU."""
    batch_size: Execution[int] = Field(default=1, ge=1)
    """Requests at once, where transformers measures; above 1, rounding differs from the `lm_eval` command's default."""


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """The parameters of the models; how much they read depends on the data."""
    models = [model_folder.cost(path, f"models.{name}", given) for name, path in config.models.items()]
    return Cost(parameters=models[0].parameters)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Measure each model that an earlier run has not measured, and write `results.json`."""
    from cordee.compute import engine
    from eval import backends, harness

    name = engine.choose(config.engine)
    for model, folder in config.models.items():
        model_folder.require(folder, f"models.{model}")
    if name == "vllm":
        engine.require_one_engine(dict(config.models))
    else:
        context.note("vLLM is not used: transformers measures")
    settings = engine.Settings(name, config.max_length, config.dtype, config.enforce_eager)
    measured: dict[str, Any] = {}
    requests = 0

    def watch(coming: int) -> None:
        nonlocal requests
        if context.stop_requested():
            context.stop(f"model {len(measured)} of {len(config.models)}")
        context.progress(len(measured), len(config.models), "models", requests=requests)
        requests += coming

    with tempfile.TemporaryDirectory(prefix="cordee-") as cache:
        tasks = [harness.read_task(path, config.data, context.out, Path(cache)) for path in config.tasks]
        samples = harness.choose(tasks, config.limit, context.out)
        measured |= _earlier(context.out, settings.describe(), tasks)
        coming = {model: folder for model, folder in config.models.items() if model not in measured}
        models = backends.Models(settings, coming.values(), batch_size=config.batch_size, watch=watch)
        for model, folder in coming.items():
            watch(0)
            lm = models.open(folder)
            began = time.monotonic()
            row = harness.measure(lm, model, tasks, samples, context)
            seconds = round(time.monotonic() - began, 3)
            measured[model] = {"name": model, "dtype": lm.dtype, **row, "seconds": seconds}
            _write(
                context.out, settings.describe(), [measured[name] for name in config.models if name in measured], tasks
            )
            notes = [f"{task}: {note}" for task, found in row["notes"].items() for note in found]
            for note in (*notes, harness.said(row["results"])):
                context.note(f"{model}: {note}")
    last = measured[list(config.models)[-1]]
    return {"rows": sum(row["documents"] for row in measured.values()), "engine": name, **last["headline"]}


def _write(out: Path, engine: dict[str, str], rows: list[dict[str, Any]], tasks: "list[Task]") -> None:
    """Write `results.json`; models in different dtypes have them all beside the engine, in their order."""
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in rows))
    about = {task.name: task.about for task in tasks}
    files.write_json(out / "results.json", {"engine": {**engine, "dtype": dtypes}, "models": rows, "tasks": about})


def _earlier(out: Path, engine: dict[str, str], tasks: "list[Task]") -> dict[str, dict[str, Any]]:
    """The rows of an earlier run that was stopped, where the same engine measured and lm-eval's files are there."""
    from eval import harness

    path = out / "results.json"
    table = files.read_json(path) if path.exists() else {"engine": {}, "models": []}
    rows = table["models"] if {**table["engine"], **engine} == table["engine"] else []
    return {row["name"]: row for row in rows if harness.is_whole(out / "lm_eval" / row["name"], tasks)}


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
