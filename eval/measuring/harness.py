"""lm-eval as a library: its own files kept, all its figures in one table.

lm-eval only warns of a result file that it could not write: here that is an error.
"""

import json
import math
import os
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import evaluator, simple_evaluate
from lm_eval import utils as lm_eval_utils
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers.utils import add_env_info
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from cordee import files
from cordee.chat.templates import special_tokens
from cordee.errors import Fault, UserError, nearest
from cordee.stage import Context
from eval.measuring import code_eval
from eval.measuring.batches import TASKS, Batch
from eval.measuring.statistics import BITS_PER_BYTE, ratio_mean, score

_TEMPLATES = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_TEMPLATES.filters.update(lm_eval_utils.env.filters)
lm_eval_utils.env = (
    _TEMPLATES  # lm-eval's own is the same without the sandbox: a template in a task's YAML could run code
)
MAX_GEN_TOKS = 256
"""Tokens of the longest answer where a task does not say, in both of lm-eval's backends."""
BOOTSTRAP_ITERATIONS = 1000
"""Resamples for the standard errors of metrics that are no means; lm-eval's own 100,000 take minutes."""


def measure(
    lm: Any, model: str, batches: list[Batch], context: Context, *, confirm_unsafe_code: bool = False
) -> dict[str, Any]:
    """Run the tasks on one model, with lm-eval's own seeds; its own files go to `lm_eval/<model>/<batch>/`.

    Raises:
        UserError: a task asks in chats, and the model has no chat template; or a metric that was asked for is unknown.
        Fault: lm-eval did not write what it should have.
    """
    folder = context.out / "lm_eval" / model
    shutil.rmtree(folder, ignore_errors=True)
    evaluator.add_env_info = lambda told: told.update(_environment())
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's bootstrap must not fork a process that holds an engine
    measured: dict[str, Any] = {"results": [], "tasks": [], "documents": 0, "notes": {}, "commands": []}
    for batch in batches:
        if batch.is_chat and lm.tokenizer.chat_template is None:
            problem = f"has no chat template, and {next(iter(batch.asked))} is asked in chats"
            raise UserError(problem, key=f"models.{model}", hint="`apply_chat_template: false` asks in plain text")
        tracker = EvaluationTracker(output_path=str(folder))
        lm.begin()
        outcome = simple_evaluate(
            model=lm,
            model_args={"pretrained": batch.label},  # which names the folder
            tasks=batch.top,
            task_manager=TaskManager(include_defaults=False),
            samples=batch.samples,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            evaluation_tracker=tracker,
            confirm_run_unsafe_code=confirm_unsafe_code,
            **batch.how,
        )
        rows = outcome.pop("samples")
        _add(measured, batch, outcome, rows)
        for name, own in rows.items():
            documents = list({row["doc_id"]: row for row in own}.values())  # one has a row for each filter
            measured["documents"] += len(documents)
            measured["notes"][name] = _notes(lm, batch, name, documents)
        measured["commands"].append(_command(lm, batch, confirm_unsafe_code=confirm_unsafe_code))
        tracker.save_results_aggregated(results=outcome, samples=rows)
        written = getattr(tracker, "date_id", "<date>")
        for name, own in rows.items():
            tracker.save_results_samples(task_name=name, samples=own)
            _require_written(folder / batch.label, f"samples_{name}_{written}.jsonl", len(own))
        _require_written(folder / batch.label, f"results_{written}.json", 1)
    files.sync_tree(folder)
    return measured


@cache
def _environment() -> dict[str, Any]:
    """What lm-eval tells of the machine and the packages: it would look for 5 seconds after each model."""
    found: dict[str, Any] = {}
    add_env_info(found)
    return found


def said(measured: Mapping[str, Any]) -> str:
    """The figures that were asked for in one line, each with its standard error."""
    figures = []
    for task, row in asked_for(measured):
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
        figures.append(f"{task['task']} {row['metric']} {row['value']:.4f}{error}")
    return "; ".join(figures)


def asked_for(measured: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each task or group that was asked for, with the row of its main metric."""
    rows = {(row["asked"], row["task"], row["metric"], row["filter"]): row for row in measured["results"]}
    keys = [(task, (task["asked"], task["task"], task["metric"], task["filter"])) for task in measured["tasks"]]
    return [(task, rows[key]) for task, key in keys if task["is_asked"] and key in rows]


def _command(lm: Any, batch: Batch, *, confirm_unsafe_code: bool) -> str:
    """lm-eval's own command for the same figures, to be run in the artifact's folder."""
    arguments = ",".join(f"{name}={value}" for name, value in lm.command_arguments.items())
    words = ["lm_eval", "--model", lm.command_model, "--model_args", arguments]
    words += ["--include_path", TASKS, "--tasks", ",".join(batch.asked)]
    words += ["--apply_chat_template"] if batch.is_chat else []
    words += ["--fewshot_as_multiturn", "false"] if batch.is_chat and not batch.how["fewshot_as_multiturn"] else []
    for name in ("num_fewshot", "system_instruction"):
        words += [] if batch.how[name] is None else [f"--{name}", str(batch.how[name])]
    if given := batch.how["gen_kwargs"]:
        words += ["--gen_kwargs", json.dumps(given)]
    words += ["--batch_size", str(lm.batch_size)] if lm.batch_size != 1 else []
    words += ["--confirm_run_unsafe_code"] if confirm_unsafe_code else []
    return shlex.join(words + ([] if batch.samples is None else ["--samples", batch.samples_file]))


def _notes(lm: Any, batch: Batch, name: str, rows: list[dict[str, Any]]) -> list[str]:
    """What lm-eval did with a task's texts that a reader of its figures should know."""
    notes = []
    pattern = special_tokens(lm.tokenizer)
    found = [match.group() for row in rows if (match := pattern.search(str(list(row["doc"].values()))))]
    if found:
        notes.append(
            f"{len(found)} of {len(rows)} documents spell out a special token such as {found[0]!r}, which lm-eval "
            "encodes as that token"
        )
    absent = {key: sum(row["doc"].get(key) is None for row in rows) for key in (rows[0]["doc"] if rows else ())}
    notes += [
        f"{count} of {len(rows)} documents have no {key!r}: where a template asks for it, it is 'None'"
        for key, count in absent.items()
        if 0 < count < len(rows)
    ]
    times = sorted({key for row in rows for key, value in row["doc"].items() if isinstance(value, date)})
    if times:
        notes.append(f"{', '.join(times)}: the file's text was read as a time, which is written differently")
    task = batch.loaded["tasks"][name]
    if task.OUTPUT_TYPE == "generate_until" and (cut := sum(_is_full(lm.tokenizer, row) for row in rows)):
        notes.append(
            f"{cut} of {len(rows)} documents have an answer of as many tokens as `max_gen_toks` allows: it may be cut "
            "off; `gen_kwargs: {max_gen_toks: …}` allows more"
        )
    first = lm.tokenizer.eos_token_id if lm.tokenizer.bos_token_id is None else lm.tokenizer.bos_token_id
    if task.OUTPUT_TYPE == "loglikelihood_rolling" and lm.tokenizer("a")["input_ids"][:1] == [first]:
        start = lm.tokenizer.decode(first)
        notes.append(
            f"lm-eval's windows begin with {start!r} twice, once from lm-eval and once from the tokenizer, and score "
            "the second one"
        )
    asked = batch.how["num_fewshot"]
    if asked and task.config.num_fewshot == 0:
        notes.append(f"num_fewshot is 0 in the task's own file, which lm-eval keeps to: not {asked}")
    if batch.is_chat and lm.note:
        notes.append(lm.note)
    return notes + code_eval.notes(task)


def _is_full(tokenizer: Any, row: Mapping[str, Any]) -> bool:
    """Whether an answer to a document has all the tokens that it may have."""
    return any(
        len(tokenizer(text, add_special_tokens=False)["input_ids"])
        >= normalize_gen_kwargs(dict(asked[1]), MAX_GEN_TOKS)["max_gen_toks"]
        for asked, said in zip(row["arguments"], row["resps"], strict=True)
        for text in said
    )


def _add(
    measured: dict[str, Any], batch: Batch, outcome: Mapping[str, Any], rows: Mapping[str, list[dict[str, Any]]]
) -> None:
    """Add the figures of all tasks and groups of a batch, for each metric and filter."""
    asked = {shown for name in batch.asked for shown in _with_figures(name, outcome)}
    for name, values in outcome["results"].items():
        better = outcome["higher_is_better"].get(name) or {}
        own = []
        for key in values:
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr") and _is_number(values[key]):
                own.append(_row(batch, name, (metric, chosen), values, rows.get(name, [])))
        measured["results"] += own
        if own:
            metric, chosen = _main(batch, name, own)
            measured["tasks"].append(
                {
                    "task": name,
                    "asked": batch.label,
                    "how": {key: value for key, value in batch.how.items() if value not in (None, False)},
                    "is_asked": name in asked,
                    "is_group": name not in batch.loaded["tasks"],
                    "documents_in_all": None if name not in rows else len(batch.loaded["tasks"][name].eval_docs),
                    "shots": outcome["n-shot"].get(name),
                    "version": outcome["versions"].get(name),
                    "metric": metric,
                    "filter": chosen,
                    "higher_is_better": {row["metric"]: better.get(row["metric"]) is not False for row in own},
                    **_about(batch, name),
                }
            )


def _with_figures(name: str, outcome: Mapping[str, Any]) -> set[str]:
    """A task or a group; in the place of a group without a figure of its own, those in it."""
    if any("," in key for key in outcome["results"].get(name, {})):
        return {name}
    return {shown for member in outcome["group_subtasks"].get(name, ()) for shown in _with_figures(member, outcome)}


def _about(batch: Batch, name: str) -> dict[str, Any]:
    """What a task's file says of itself."""
    task = batch.loaded["tasks"].get(name)
    told = (task.config.metadata if task is not None else None) or {}
    return {"description": str(told.get("description") or ""), "chance": told.get("chance")}


def _main(batch: Batch, name: str, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """The metric and filter that are shown first: those that were asked for, else the first.

    Raises:
        UserError: the task has no such metric.
    """
    wanted = batch.asked[name].metric if name in batch.asked else None
    for row in rows:
        if wanted in (None, row["metric"], f"{row['metric']},{row['filter']}"):
            return row["metric"], row["filter"]
    known = [f"{row['metric']},{row['filter']}" for row in rows]
    raise UserError(f"{name} has no metric {wanted!r}", key="tasks.metric", hint=nearest(str(wanted), known))


def _row(
    batch: Batch, name: str, key: tuple[str, str], values: Mapping[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """One figure of a task or a group, overall and, where it is a mean over documents, by language."""
    metric, chosen = key
    value, error = values[f"{metric},{chosen}"], values.get(f"{metric}_stderr,{chosen}")
    own = [row for row in rows if row["filter"] == chosen and metric in row]
    by_language: dict[str, float] = {}
    try:
        overall, own_error = _ratio(metric, own)
    except (TypeError, ValueError):  # no number for each document
        overall, own_error = math.nan, None
    if math.isclose(overall, value, rel_tol=1e-9, abs_tol=1e-12):
        error = own_error if metric == BITS_PER_BYTE else error  # lm-eval has none for it
        by_language = _by_language(metric, own)
    return {
        "task": name,
        "asked": batch.label,
        "metric": metric,
        "filter": chosen,
        "value": value,
        "standard_error": error if _is_number(error) else None,
        "documents": values["sample_len"],
        "by_language": by_language,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _by_language(metric: str, rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """A metric for each language, from lm-eval's own rows; nothing where no document has one."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["doc"].get("language") or ""].append(row)
    return {name: _ratio(metric, own)[0] for name, own in sorted(groups.items())} if groups.keys() - {""} else {}


def _ratio(metric: str, rows: Iterable[dict[str, Any]]) -> tuple[float, float | None]:
    """A metric over some of lm-eval's own rows, and its standard error."""
    values, weights = zip(*(score(metric, row[metric]) for row in rows), strict=True)
    return ratio_mean(values, weights)


def _require_written(folder: Path, name: str, lines: int) -> None:
    """lm-eval only warns when it can't write: look for its file."""
    path = folder / name
    if not path.is_file() or path.read_bytes().count(b"\n") < lines:
        raise Fault(f"lm-eval did not write {name}", file=folder, hint="look for its warning in the log")
