"""lm-eval as a library: task files with local data, its own files kept, its figures in one table.

lm-eval only warns of a result file that it could not write: here that is an error.
"""

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import load_dataset
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from cordee import files
from cordee.errors import Fault, UserError, nearest
from cordee.stage import Context
from eval.prompts import spread
from eval.statistics import BITS_PER_BYTE, ratio_mean, score

BOOTSTRAP_ITERATIONS = 1000


@dataclass(frozen=True)
class Task:
    """One lm-eval task file with its data filled in."""

    config: dict[str, Any]
    metric: str
    is_chat: bool
    about: dict[str, Any]

    @property
    def name(self) -> str:
        """The task's name, as lm-eval and the report have it."""
        return str(self.config["task"])


def read_task(path: Path, data: Mapping[str, Path], cache: Path) -> Task:
    """Read a task file, and put the paths of the data in the place of their names; `cache` is for their Arrow form.

    Raises:
        UserError: it is no task file, or names data that is not given.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))  # as lm-eval reads its own
        (metric,) = config["metric_list"]
        metadata, splits = config["metadata"], dict(config["dataset_kwargs"]["data_files"])
        about = {name: metadata[name] for name in ("description", "chance")}
        about |= {name: metric[name] for name in ("metric", "higher_is_better")}
        is_chat = bool(metadata["chat"])
        absent = sorted({"task", "dataset_path", "test_split"} - config.keys())
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"is no task file: {error!r}", file=path, key="tasks") from error
    if absent:
        raise UserError(f"is no task file: it has no {absent[0]}", file=path, key="tasks")
    for split, name in splits.items():
        if str(name) not in data:
            raise UserError(f"needs data named {name!r}", file=path, key="data", hint=nearest(str(name), data))
        splits[split] = str(data[str(name)])
    config["dataset_kwargs"] |= {"data_files": splits, "cache_dir": str(cache)}
    return Task(config, metric["metric"], is_chat, about)


def measure(lm: Any, model: str, tasks: list[Task], limit: int | None, context: Context) -> dict[str, Any]:
    """Run the tasks on one model; lm-eval's own files go to `lm_eval/<model>/`.

    Raises:
        UserError: a task asks in chats, and the model has no chat template.
        Fault: lm-eval did not write what it should have.
    """
    folder = context.out / "lm_eval"
    shutil.rmtree(folder / model, ignore_errors=True)
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's bootstrap must not fork a process that holds an engine
    measured: dict[str, Any] = {"results": {}, "by_language": {}, "headline": {}, "documents": 0}
    for is_chat in (True, False):
        chosen = [task for task in tasks if task.is_chat == is_chat]
        if not chosen:
            continue
        if is_chat and lm.tokenizer.chat_template is None:
            raise UserError(f"has no chat template, and {chosen[0].name} asks in chats", key=f"models.{model}")
        tracker = EvaluationTracker(output_path=str(folder))
        outcome = simple_evaluate(
            model=lm,
            model_args={"pretrained": model},
            tasks=[task.config for task in chosen],
            task_manager=TaskManager(include_defaults=False),
            samples={task.name: _chosen(task, limit) for task in chosen} if limit else None,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            apply_chat_template=is_chat,
            evaluation_tracker=tracker,
            random_seed=context.seed,
            numpy_random_seed=context.seed,
            torch_random_seed=context.seed,
            fewshot_random_seed=context.seed,
        )
        samples = outcome.pop("samples")
        for task in chosen:
            _add(measured, task, outcome["results"][task.name], samples[task.name])
        tracker.save_results_aggregated(results=outcome, samples=samples)
        written = getattr(tracker, "date_id", "<date>")
        for name, rows in samples.items():
            tracker.save_results_samples(task_name=name, samples=rows)
            _require_written(folder / model, f"samples_{name}_{written}.jsonl", len(rows))
        _require_written(folder / model, f"results_{written}.json", 1)
    files.sync_tree(folder / model)
    return measured


def _chosen(task: Task, limit: int) -> list[int]:
    """Which documents of a task are measured: lm-eval's own limit takes the first, which are often of one language."""
    documents = load_dataset(
        task.config["dataset_path"], split=task.config["test_split"], **task.config["dataset_kwargs"]
    )
    named = documents["language"] if "language" in documents.column_names else [""] * len(documents)
    rows = [{"language": language, "index": index} for index, language in enumerate(named)]
    return [row["index"] for row in spread(rows, limit)]


def said(results: Mapping[str, Mapping[str, float | None]]) -> str:
    """A model's figures in one line, each with its standard error."""
    figures = []
    for task, values in results.items():
        (metric, value), (_, error) = values.items()
        figures.append(f"{task} {metric} {value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    return "; ".join(figures)


def is_whole(folder: Path, tasks: Iterable[Task]) -> bool:
    """Whether lm-eval's files of an earlier run are there for every task."""
    return all(list(folder.glob(f"samples_{task.name}_*.jsonl")) for task in tasks)


def _add(measured: dict[str, Any], task: Task, result: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add one task's figures, overall and by language."""
    key = next(key for key in result if key.partition(",")[0] == task.metric)
    error = result.get(f"{task.metric}_stderr,{key.partition(',')[2]}")
    if task.metric == BITS_PER_BYTE:  # lm-eval has none for it
        error = _ratio(task, rows)[1]
    measured["results"][task.name] = {
        task.metric: result[key],
        f"{task.metric}_stderr": error if isinstance(error, float) and math.isfinite(error) else None,
    }
    measured["by_language"][task.name] = _by_language(task, rows)
    measured["headline"][f"{task.name}.{task.metric}"] = result[key]
    measured["documents"] += len(rows)


def _by_language(task: Task, rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """A task's metric for each language, from lm-eval's own rows."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["doc"].get("language", "")].append(row)
    return {name: _ratio(task, own)[0] for name, own in sorted(groups.items())}


def _ratio(task: Task, rows: Iterable[dict[str, Any]]) -> tuple[float, float | None]:
    """A task's metric over some of lm-eval's own rows, and its standard error."""
    values, weights = zip(*(score(task.metric, row[task.metric]) for row in rows), strict=True)
    return ratio_mean(values, weights)


def _require_written(folder: Path, name: str, lines: int) -> None:
    """lm-eval only warns when it can't write: look for its file."""
    path = folder / name
    if not path.is_file() or path.read_bytes().count(b"\n") < lines:
        raise Fault(f"lm-eval did not write {name}", file=folder, hint="look for its warning in the log")
