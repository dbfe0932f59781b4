"""Reads what a benchmark has measured."""

from pathlib import Path
from typing import Any

from eval import benchmark
from eval.measuring import batches


def figure(row: dict[str, Any], task: str, metric: str | None = None, chosen: str | None = None) -> dict[str, Any]:
    """A model's figure: the main one of a task, or that of a metric and a filter."""
    main = next(told for told in row["tasks"] if told["task"] == task)
    key = metric or main["metric"], chosen or (main["filter"] if metric is None else "none")
    return next(one for one in row["results"] if (one["task"], one["metric"], one["filter"]) == (task, *key))


def asked(tasks: list[Any], data: dict[str, Path], model: Path, folder: Path, **keys: Any) -> list[batches.Batch]:
    """The tasks with their data, as the stage makes them."""
    given = {name: str(path) for name, path in data.items()}
    config = {"models": {"m": str(model)}, "tasks": [str(task) for task in tasks], "data": given, **keys}
    return batches.make(benchmark.Config.model_validate(config), folder, folder / "cache")
