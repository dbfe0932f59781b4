"""lm-eval as a library: task files with local data, its own files kept, its figures in one table.

lm-eval only warns of a result file that it could not write: here that is an error.
"""

import math
import os
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from cordee import files
from cordee.chat.templates import special_tokens
from cordee.errors import Fault, UserError, nearest
from cordee.stage import Context
from eval.measuring.prompts import spread
from eval.measuring.statistics import BITS_PER_BYTE, ratio_mean, score

BOOTSTRAP_ITERATIONS = 1000
"""Resamples for the standard errors of metrics that are no means; lm-eval's own 100,000 take minutes."""
TASKS = "tasks"
"""The folder of an artifact that holds the tasks as they were measured, for lm-eval's own command."""
SAMPLES = f"{TASKS}/samples.json"


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


def read_tasks(paths: Iterable[Path], data: Mapping[str, Path], out: Path, cache: Path) -> list[Task]:
    """Read task files, each as `read_task` does.

    Raises:
        UserError: one can't be read, or two have the same name, by which lm-eval tells tasks apart.
    """
    tasks: dict[str, Task] = {}
    places: dict[str, Path] = {}
    for path in paths:
        task = read_task(path, data, out, cache)
        if task.name in tasks:
            problem = f"its name {task.name!r} is that of {places[task.name]} too: only one of them would be measured"
            raise UserError(problem, file=path, key="tasks", hint="give one of them another `task:`")
        tasks[task.name], places[task.name] = task, path
    return list(tasks.values())


def read_task(path: Path, data: Mapping[str, Path], out: Path, cache: Path) -> Task:
    """Read a task file, and put the paths of the data in the place of their names.

    Args:
        path: the file, as lm-eval reads it: with `include` and `!function`.
        data: the paths by name.
        out: gets `tasks/<task>.yaml`, which includes the file and names the data's paths.
        cache: for the data in Arrow's form.

    Raises:
        UserError: it is no task file, or names data that is not given.
    """
    try:
        config = load_yaml(path)
        (metric,) = config["metric_list"]
        metadata, splits = config["metadata"], dict(config["dataset_kwargs"]["data_files"])
        about = {name: metadata[name] for name in ("description", "chance")}
        about |= {name: metric[name] for name in ("metric", "higher_is_better")}
        is_chat = bool(metadata["chat"])
        absent = sorted({"task", "dataset_path", "test_split"} - config.keys())
    except (yaml.YAMLError, ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"is no task file: {error!r}", file=path, key="tasks") from error
    if absent:
        raise UserError(f"is no task file: it has no {absent[0]}", file=path, key="tasks")
    sources = ("fewshot_split", "training_split", "validation_split")
    has_source = any(map(config.get, sources)) or "samples" in config.get("fewshot_config", {})
    if config.get("num_fewshot") and not has_source:
        problem = "examples would be drawn from the documents that are asked, each with its own answer among them"
        hint = f"fewshot_split: {config['test_split']} leaves the asked one out"
        raise UserError(problem, file=path, key="num_fewshot", hint=hint)
    for split, name in splits.items():
        if str(name) not in data:
            raise UserError(f"needs data named {name!r}", file=path, key="data", hint=nearest(str(name), data))
        splits[split] = str(data[str(name)].resolve())
    config["dataset_kwargs"] |= {"data_files": splits}
    measured = {"include": str(path.resolve()), "dataset_kwargs": dict(config["dataset_kwargs"])}
    (out / TASKS).mkdir(exist_ok=True)
    files.write_text(out / TASKS / f"{config['task']}.yaml", yaml.safe_dump(measured, allow_unicode=True))
    config["dataset_kwargs"]["cache_dir"] = str(cache)
    return Task(config, metric["metric"], is_chat, about)


def choose(tasks: Iterable[Task], limit: int | None, out: Path) -> dict[str, list[int]] | None:
    """Which documents of each task are measured, written to `tasks/samples.json`; None for all of them.

    Where the documents have a column `language`, `limit` is spread over the languages; else it takes the first, as
    lm-eval's own limit does.
    """
    if limit is None:
        return None
    chosen = {task.name: _chosen(task, limit) for task in tasks}
    files.write_json(out / SAMPLES, chosen)
    return chosen


def _chosen(task: Task, limit: int) -> list[int]:
    documents = TaskManager(include_defaults=False).load([dict(task.config)])["tasks"][task.name].eval_docs
    if "language" not in documents.column_names:
        return list(range(min(limit, len(documents))))
    rows = [{"language": language, "index": index} for index, language in enumerate(documents["language"])]
    return [row["index"] for row in spread(rows, limit)]


def measure(
    lm: Any, model: str, tasks: list[Task], samples: dict[str, list[int]] | None, context: Context
) -> dict[str, Any]:
    """Run the tasks on one model, with lm-eval's own seeds; its own files go to `lm_eval/<model>/`.

    Raises:
        UserError: a task asks in chats, and the model has no chat template.
        Fault: lm-eval did not write what it should have.
    """
    folder = context.out / "lm_eval"
    shutil.rmtree(folder / model, ignore_errors=True)
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's bootstrap must not fork a process that holds an engine
    measured: dict[str, Any] = {
        "results": {}, "by_language": {}, "headline": {}, "documents": 0, "notes": {}, "commands": [],
    }  # fmt: skip
    for is_chat in (True, False):
        chosen = [task for task in tasks if task.is_chat == is_chat]
        if not chosen:
            continue
        if is_chat and lm.tokenizer.chat_template is None:
            raise UserError(f"has no chat template, and {chosen[0].name} asks in chats", key=f"models.{model}")
        tracker = EvaluationTracker(output_path=str(folder))
        lm.begin()
        outcome = simple_evaluate(
            model=lm,
            model_args={"pretrained": model},
            tasks=[task.config for task in chosen],
            task_manager=TaskManager(include_defaults=False),
            samples={task.name: samples[task.name] for task in chosen} if samples else None,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            apply_chat_template=is_chat,
            evaluation_tracker=tracker,
        )
        rows_by_task = outcome.pop("samples")
        for task in chosen:
            _add(measured, task, outcome["results"][task.name], rows_by_task[task.name])
            documents = {row["doc_id"]: row for row in rows_by_task[task.name]}  # one has a row for each filter
            measured["notes"][task.name] = _notes(lm, task, list(documents.values()))
        measured["commands"].append(_command(lm, chosen, samples is not None))
        tracker.save_results_aggregated(results=outcome, samples=rows_by_task)
        written = getattr(tracker, "date_id", "<date>")
        for name, rows in rows_by_task.items():
            tracker.save_results_samples(task_name=name, samples=rows)
            _require_written(folder / model, f"samples_{name}_{written}.jsonl", len(rows))
        _require_written(folder / model, f"results_{written}.json", 1)
    files.sync_tree(folder / model)
    return measured


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


def _command(lm: Any, tasks: Iterable[Task], has_samples: bool) -> str:
    """lm-eval's own command for the same figures, to be run in the artifact's folder."""
    arguments = ",".join(f"{name}={value}" for name, value in lm.command_arguments.items())
    names = ",".join(f"{TASKS}/{task.name}.yaml" for task in tasks)
    words = ["lm_eval", "--model", lm.command_model, "--model_args", arguments, "--tasks", names]
    words += ["--apply_chat_template"] if all(task.is_chat for task in tasks) else []
    words += ["--batch_size", str(lm.batch_size)] if lm.batch_size != 1 else []
    return shlex.join(words + (["--samples", SAMPLES] if has_samples else []))


def _notes(lm: Any, task: Task, rows: list[dict[str, Any]]) -> list[str]:
    """What lm-eval did with a task's texts that a reader of its figures should know."""
    notes = []
    pattern = special_tokens(lm.tokenizer)
    found = [match.group() for row in rows if (match := pattern.search(str(list(row["doc"].values()))))]
    if found:
        notes.append(
            f"{len(found)} of {len(rows)} documents spell out a special token such as {found[0]!r}, which lm-eval "
            "encodes as that token"
        )
    absent = {name: sum(row["doc"].get(name) is None for row in rows) for name in (rows[0]["doc"] if rows else ())}
    notes += [
        f"{count} of {len(rows)} documents have no {name!r}: where a template asks for it, it is 'None'"
        for name, count in absent.items()
        if 0 < count < len(rows)
    ]
    times = sorted({name for row in rows for name, value in row["doc"].items() if isinstance(value, date)})
    if times:
        notes.append(f"{', '.join(times)}: the file's text was read as a time, which is written differently")
    if task.config["output_type"] == "loglikelihood_rolling" and lm.tok_encode("a")[:1] == [lm.prefix_token_id]:
        start = lm.tokenizer.decode(lm.prefix_token_id)
        notes.append(
            f"lm-eval's windows begin with {start!r} twice, once from lm-eval and once from the tokenizer, and score "
            "the second one"
        )
    if task.is_chat and lm.note:
        notes.append(lm.note)
    return notes


def _add(measured: dict[str, Any], task: Task, result: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add one task's figures, overall and, where they are means over documents, by language."""
    key = next(key for key in result if key.partition(",")[0] == task.metric)
    chosen = key.partition(",")[2]
    rows = [row for row in rows if row["filter"] == chosen]  # lm-eval has a row for each filter
    error = result.get(f"{task.metric}_stderr,{chosen}")
    if task.metric == BITS_PER_BYTE:  # lm-eval has none for it
        error = _ratio(task, rows)[1]
    measured["results"][task.name] = {
        task.metric: result[key],
        f"{task.metric}_stderr": error if isinstance(error, float) and math.isfinite(error) else None,
    }
    is_mean = math.isclose(_ratio(task, rows)[0], result[key], rel_tol=1e-9, abs_tol=1e-12)
    measured["by_language"][task.name] = _by_language(task, rows) if is_mean else {}
    measured["headline"][f"{task.name}.{task.metric}"] = result[key]
    measured["documents"] += len(rows)


def _by_language(task: Task, rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """A task's metric for each language, "" where there is none, from lm-eval's own rows."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["doc"].get("language") or ""].append(row)
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
