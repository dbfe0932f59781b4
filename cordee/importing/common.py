"""What the peers have in common: batches, schedules, optimizers, models and data of the hub."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cordee import peek, stage
from cordee.chat import named
from cordee.config import libraries
from cordee.data.kinds import COMPRESSIONS, KINDS
from cordee.importing.draft import Draft, is_off

TRACKERS = "where a run is logged; `report_to: [tensorboard]` in the stage names trackers"
DATA = "hub:datasets/"
"""Begins a data set of the hub."""
HUB = "where a model is published: `cordee export` writes a folder for the hub"
FOLDERS = "artifacts have a place of their own, runs/"
LAUNCH = "how processes share the model: `launch: {config_file: …}` takes an accelerate configuration"
REMOTE = "code in a model's folder is not run; transformers' own class of the model is used"
KERNELS = "the same results, computed with other kernels"
WORKERS = "speed of preparing data"
REFERENCE = "what the reference says is always computed once, before the first step"
SAVES = "the last model is published; `save_steps` publishes others, `resume_steps` says what a kill can cost"
EVALS = "the loss of `heldout` is measured before the first step and at the end; `eval_steps` measures between"
LENGTHS = "rows are drawn at random"
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_SLICE = re.compile(r"(?P<name>[\w.-]+)\[:(?P<rows>\d+)\]")


@cache
def trainer_fields(method: str) -> frozenset[str]:
    """What `trainer:` of a stage takes: the fields of the library's config less those that the stage sets itself."""
    marks = dict(libraries(stage.load(f"posttrain.{method}").config))
    return frozenset(peek.dataclass_fields(marks["trainer"].dataclass_name).keys() - marks["trainer"].owned.keys())


def number(value: Any) -> Any:
    """A number that YAML 1.2 reads as a text (`"2e-4"`, `500_000`); anything else as it is."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        return value
    return int(value) if value.replace("_", "").lstrip("+-").isdecimal() else float(value)


def copy(draft: Draft, names: Mapping[str, str]) -> None:
    """Take keys whose values mean the same here: peer's key → ours."""
    for theirs, ours in names.items():
        if (value := draft.get(theirs)) is not None:
            draft.take(ours, number(value), theirs)


def batch(draft: Draft, rows: str, accumulation: str, processes: int, default: tuple[int, int]) -> None:
    """Take the rows of a process and the accumulation steps, with the number of processes that is assumed."""
    each, times = (number(draft.get(path, other)) for path, other in zip((rows, accumulation), default, strict=True))
    told = f"{rows} {each} * {accumulation} {times} * {processes} process{'es' if processes > 1 else ''}"
    draft.take("global_batch_size", each * times * processes, rows, accumulation, remark=told)
    draft.take("per_device_train_batch_size", each, rows)
    if processes > 1:
        draft.take("launch.num_processes", processes, remark="as asked for on the command line")


def warmup(draft: Draft, steps: str, ratio: str) -> None:
    """Take the steps of a warm-up; transformers reads a number below 1 as a share of all steps."""
    if not is_off(asked := number(draft.get(steps))):
        draft.take("trainer.warmup_steps", asked, steps)
        draft.skip(ratio, f"{steps} counts")
    elif not is_off(share := number(draft.get(ratio))):
        draft.take("trainer.warmup_steps", share, ratio, remark=f"{ratio}: a share of all steps")
        draft.skip(steps, f"{ratio} counts")
    else:
        for path in (steps, ratio):
            draft.skip(path, "no warm-up, as it is here without the key")


def optimizer(draft: Draft, path: str) -> None:
    """Take an optimizer by its name in transformers."""
    asked = draft.get(path)
    if asked in peek.members("transformers.training_args.OptimizerNames"):
        draft.take("trainer.optim", asked, path)
    elif asked is not None:
        draft.lose(path, "transformers has no such optimizer: AdamW is used")


def schedule(draft: Draft, path: str, options: str) -> None:
    """Take a schedule of the learning rate by its name in transformers, and its options."""
    asked = draft.get(path)
    if asked in peek.members("transformers.trainer_utils.SchedulerType"):
        draft.take("trainer.lr_scheduler_type", asked, path)
        copy(draft, {options: "trainer.lr_scheduler_kwargs"})
    elif asked is not None:
        instead = draft.keys.get("trainer.lr_scheduler_type", "linear")
        draft.lose(path, f"transformers has no such schedule: {instead} is used")
        draft.lose(options, "belongs to a schedule that is not here")


def place(name: Any, revision: Any = None, of: str = "hub:") -> str:
    """A model or data set as a recipe has it: a path where there is one or it can be nothing else, else of the hub."""
    text = str(name)
    is_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or Path(text).expanduser().exists()
    if is_path or "://" in text or text.endswith((*KINDS, *COMPRESSIONS)):
        return text
    return f"{of}{text}" + (f"@{revision}" if revision and revision != "main" else "")


def model(draft: Draft, path: str, revision: str, adapter: str) -> None:
    """Take the model, or the adapter on it that is trained on."""
    whole, start = place(draft.get(path, ""), draft.get(revision)), draft.get(adapter)
    if start is None:
        draft.take("model", whole, path, revision)
        return
    draft.take("model", place(start), adapter)
    draft.take("base", whole, path, revision)


def template(draft: Draft, path: str, names: Mapping[str, str], given: Any = None) -> None:
    """Take a chat template: a text, a file, a name that this project knows, or the model's own."""
    asked = draft.get(path) if given is None else given
    known = named.templates()
    if asked is None:
        return
    if "{" in str(asked):
        draft.template = str(asked)
        draft.take("chat_template", "", path, remark=f"the text of {path}")
    elif str(asked).endswith((".jinja", ".jinja2", ".j2")):
        draft.take("chat_template", asked, path)
    elif (name := names.get(asked, asked)) in known:
        draft.take("chat_template", name, path)
    elif name == "":
        draft.skip(path, "the model's own chat template is used without the key")
    else:
        draft.lose(path, "no template of this name here: the model's own is used; `chat_template: FILE` gives another")


def end_of_turn(draft: Draft, path: str) -> None:
    """Take an end of turn where the chat template writes it: what ends an answer there is trained and ends it."""
    told, name = draft.get(path), draft.keys.get("chat_template")
    text = draft.template or (named.templates()[name].read_text(encoding="utf-8") if name in named.templates() else "")
    if told and str(told) in text:
        draft.came("chat_template", path)


def source(draft: Draft, at: str, path: str, told: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, Any]:
    """Take a data set.

    Args:
        draft: the recipe in the making.
        at: the key of the stage: `data.0`.
        path: where it is, as `place` has it.
        told: our key → the peer's, of `split`, `subset`, `files`, `limit`.
        columns: columns to rename.
    """
    found: dict[str, Any] = {"path": path}
    for ours, theirs in told.items():
        value = draft.get(theirs)
        if is_off(value):
            continue
        if ours == "split" and (cut := _SLICE.fullmatch(str(value))):
            found |= {"split": cut["name"], "limit": int(cut["rows"])}
        elif ours == "split" and "[" in str(value):
            found["split"] = str(value).partition("[")[0]
            draft.lose(theirs, "a part of a split: the whole split is read; `limit` reads the first rows")
            continue
        else:
            found[ours] = [value] if ours == "files" and not isinstance(value, list) else value
        draft.came(f"{at}.{ours}", theirs)
    if renamed := {old: new for old, new in columns.items() if old != new}:
        found["columns"] = renamed
    return found


def files(draft: Draft, name: str, files_key: str, told: dict[str, str]) -> str:
    """Where a data set is, of which the name of a format may stand in place of a path, as `datasets` has it.

    A single file becomes the path, and `files` is left to patterns below a folder or in a repository.
    """
    named_files = draft.get(files_key)
    single = [named_files] if isinstance(named_files, str) else named_files
    if isinstance(single, list) and len(single) == 1 and name in ("json", "csv", "parquet", "arrow", "text", "file"):
        draft.came("data.path", files_key)
        told.pop("files", None)
        return place(single[0], of=DATA)
    return place(name, of=DATA)
