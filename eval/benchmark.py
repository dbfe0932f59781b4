"""Measures checkpoints and adapters with lm-eval: its own tasks by name, and task files.

    python -m eval.benchmark --config benchmarks.yaml

lm-eval's own results and samples stand untouched in `lm_eval/<model>/`; `results.json` has all figures in one table.
"""

import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from cordee import files, machine, model_folder, worker
from cordee.config import Execution
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.model_folder import ModelInput
from cordee.stage import Context
from eval.measuring.asked import CONFIRM, Name, TasksConfig, told_of
from eval.measuring.settings import ModelsConfig

VERSION = 6


class Config(ModelsConfig, TasksConfig):
    """Which checkpoints are measured, on what."""

    models: dict[Name, ModelInput] = Field(min_length=1)
    """Checkpoints and LoRA adapters by names that folders can have, in the order in which they were trained."""
    confirm_unsafe_code: bool = False
    """Whether tasks may run code that the models write, as HumanEval does; each program is run in a sandbox."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Requests at once, as in the `lm_eval` command; with `auto`, vLLM is given many (64 on a CPU, 256 on a GPU), which
    is many times faster and rounds differently."""
    data_parallel_size: Execution[int] = Field(default=1, ge=1)
    """Processes that each hold the model, on `tensor_parallel_size` GPUs of their own, and answer a share."""

    def num_gpus(self) -> int:
        """Those of all its processes."""
        return self.data_parallel_size * self.tensor_parallel_size

    @model_validator(mode="after")
    def _confirmed(self) -> Self:
        """Tasks that say of themselves that they run what models write are known before anything starts."""
        for told in told_of(self):
            if told.get("unsafe_code") and not self.confirm_unsafe_code:
                raise UserError(f"{told['task']} runs code that the models write", key="tasks", hint=CONFIRM)
        return self


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """The parameters of the models; how much they read depends on the data."""
    models = [model_folder.cost(path, f"models.{name}", given) for name, path in config.models.items()]
    return Cost(parameters=models[0].parameters)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Measure each model, with the answers that it has given before, and write `results.json`."""
    from eval.measuring import answers, backends, batches, harness, replicas

    settings, gpus = config.settings(context), len(machine.gpus())
    if config.data_parallel_size * config.tensor_parallel_size > (there := gpus or machine.cores()):
        problem = f"{config.data_parallel_size} processes don't fit on {there} {'GPUs' if gpus else 'cores'}"
        raise UserError(problem, key="data_parallel_size")
    measured: dict[str, Any] = {}
    requests = 0

    def watch(coming: int) -> None:
        nonlocal requests
        if context.stop_requested():
            context.stop(f"model {len(measured)} of {len(config.models)}")
        context.progress(len(measured), len(config.models), "models", requests=requests)
        requests += coming

    confirmed, folders = config.confirm_unsafe_code, list(config.models.values())
    models = backends.Models(settings, folders, batch_size=config.batch_size, watch=watch, waits=context.waits)
    others = replicas.Replicas(
        config.data_parallel_size, settings, folders, batch_size=config.batch_size, cache=context.cache, watch=watch
    )
    share = others.share if config.data_parallel_size > 1 else None
    with tempfile.TemporaryDirectory(prefix="cordee-") as cache, closing(models), closing(others):
        context.waits("the tasks and their data")
        asked = batches.make(config, context.out, Path(cache), confirm_unsafe_code=confirmed)
        for model in models.in_turn(config.models):
            watch(0)
            lm = answers.Asked(models, config.models[model], context.cache, share)
            began = time.monotonic()
            row = harness.measure(lm, model, asked, context, confirm_unsafe_code=confirmed)
            seconds = round(time.monotonic() - began - lm.starting_s, 3)
            measured[model] = {"name": model, "dtype": lm.dtype, **row, "seconds": seconds}
            notes = [f"{task}: {note}" for task, found in row["notes"].items() for note in found]
            notes += [f"{lm.found} of {lm.asked} requests were answered earlier"] if lm.found else []
            for note in (*notes, harness.said(row)):
                context.note(f"{model}: {note}")
    rows = [measured[name] for name in config.models]
    _write(context.out, settings.describe(), rows)
    figures = {f"{task['task']}.{row['metric']}": row["value"] for task, row in harness.asked_for(rows[-1])}
    return {"rows": sum(row["documents"] for row in rows), "engine": settings.name, **figures}


def _write(out: Path, engine: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Write `results.json`; models in different dtypes have them all beside the engine, in their order."""
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in rows))
    files.write_json(out / "results.json", {"engine": {**engine, "dtype": dtypes}, "models": rows})


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
