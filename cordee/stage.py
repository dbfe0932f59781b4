"""A stage: a Python module with a docstring, a `Config`, a `run(config, context) -> metrics` and a `main`.

`uses: posttrain.sft` names the module; nothing is registered anywhere. A module may also hold `VERSION`, a whole number
that is raised when its results change (1 if there is none), and `cost(config, given) -> Cost`, which `plan` calls.
"""

import ast
import functools
import importlib
import importlib.util
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from cordee import events, files
from cordee.config import Config
from cordee.cost import Cost
from cordee.errors import Stopped, UserError, nearest
from cordee.heartbeat import Heart

CACHE = "CORDEE_CACHE"
"""In the environment of a stage: a folder for what it can make again, kept from one start to the next."""
DEADLINE = "CORDEE_DEADLINE"
"""In the environment of a job with a time limit: when its stage saves and ends (seconds since 1970)."""
ASKED = threading.Event()
"""Set where this process was asked to stop by a signal, as Slurm sends it to all processes of a job."""
BEGINS_AGAIN = "the next run begins this stage again"
STAGE_PACKAGES = ("pretrain", "posttrain", "eval")
BY_STEP = ("metrics.jsonl", "completions.jsonl")
"""Files of an artifact to which a training appends lines, each of which names its `step`."""


def is_due() -> bool:
    """Whether the deadline of this job, if it has one, has passed."""
    return time.time() >= float(os.environ.get(DEADLINE, "inf"))


@dataclass(frozen=True)
class Context:
    """What a stage is given besides its config: its output folder, its seed, and a way to report.

    Every process of a stage has one; `log`, `progress` and `note` write in the main process only.
    """

    out: Path
    """The output folder; its content is published as the artifact when `run` returns."""
    seed: int
    events: Path
    """`events.jsonl`: progress and notes, for the display; no part of the artifact."""

    @functools.cached_property
    def heart(self) -> Heart:
        """Says what this process does, for what watches it; a stage that trains calls it."""
        return Heart(self.events.parent)

    def ends(self) -> None:
        """The stage has ended in this process."""
        if "heart" in self.__dict__:
            self.heart.enter("end")

    @property
    def is_main(self) -> bool:
        """Whether this is the process of rank 0, which writes and reports."""
        return int(os.environ.get("RANK", "0")) == 0

    @property
    def cache(self) -> Path:
        """A folder for what can be made again: beside the artifacts, or with the resume points of a stage alone."""
        return Path(os.environ.get(CACHE) or self.out / "resume")

    def log(self, step: int, **metrics: float | str) -> None:
        """Append one line to the artifact's `metrics.jsonl`."""
        if self.is_main:
            events.append_row(self.out / "metrics.jsonl", {"step": step, **metrics})

    def keep(self, *rows: dict[str, Any]) -> None:
        """Append lines to the artifact's `completions.jsonl`, each with its `step`."""
        if self.is_main:
            events.append_row(self.out / "completions.jsonl", *rows)

    def flush(self) -> None:
        """Flush what is written by the step: a resume point marked next must not outlive the lines before it."""
        there = [path for name in BY_STEP if (path := self.out / name).exists()]
        if self.is_main and there:
            for path in there:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            files.sync_folder(self.out)

    def rewind(self, step: int) -> None:
        """Drop the lines by the step and the `checkpoints/` after `step`: a resumed run writes them again."""
        if not self.is_main:
            return
        for path in (self.out / name for name in BY_STEP):
            if path.exists():
                files.cut_lines(path, lambda row: row["step"] <= step)
        for folder in (self.out / "checkpoints").glob("*"):
            if not (folder.name.isdecimal() and int(folder.name) <= step):
                shutil.rmtree(folder)

    def progress(self, done: float, total: float, unit: str, **figures: float) -> None:
        """Report progress: `done` of `total` units, with figures such as `loss` or `tokens_per_s`."""
        if self.is_main:
            events.append(self.events, "progress", done=done, total=total, unit=unit, figures=figures)

    def waits(self, text: str) -> None:
        """Report what the stage waits for until it reports progress: `waits for <text>`."""
        if self.is_main:
            events.append(self.events, "waits", text=text)

    def note(self, text: str) -> None:
        """Report one line of text."""
        if self.is_main:
            events.append(self.events, "note", text=text)

    def resumed(self, step: int) -> None:
        """Report that a training resumes from the resume point of `step`."""
        if self.is_main:
            events.append(self.events, "resumed", step=step, text=f"goes on from step {step}")

    def incident(self, kind: str, step: int, text: str) -> None:
        """Report what went wrong at a step and did not end the stage."""
        if self.is_main:
            events.append(self.events, "incident", kind=kind, step=step, text=text)

    def saved(self, step: int, blocked_s: float, seconds: float) -> None:
        """Report that the resume point of `step` is written: how long training waited for it, and how long it took."""
        if self.is_main:
            events.append(self.events, "saved", step=step, blocked_s=blocked_s, seconds=seconds)

    def stop_requested(self) -> bool:
        """Whether the run was asked to stop, or its time is over: the stage then saves its state and calls `stop`."""
        return is_due() or ASKED.is_set() or (self.events.parent / "stop").exists()

    def save_requested(self) -> bool:
        """Whether a resume point was asked for, by a file `save` beside the events; see `drop_save_request`."""
        return (self.events.parent / "save").exists()

    def drop_save_request(self) -> None:
        """The resume point that was asked for is written."""
        if self.is_main:
            (self.events.parent / "save").unlink(missing_ok=True)

    def stop_if_asked(self, where: str) -> None:
        """End a stage that saves no state, if the run was asked to stop; `where` is its progress (`document 3 of 9`).

        Raises:
            Stopped: it was.
        """
        if self.stop_requested():
            raise Stopped(f"stopped at {where}; {BEGINS_AGAIN}")

    def stop(self, where: str) -> None:
        """End the stage after its state was saved; `where` is its progress (`step 120 of 900`).

        Raises:
            Stopped: always.
        """
        raise Stopped(f"stopped at {where}; the next run continues from there")


@dataclass(frozen=True)
class Stage:
    """The parts of a stage's module."""

    uses: str
    config: type[Config]
    run: Callable[[Any, Context], dict[str, Any]]
    cost: Callable[[Any, dict[str, Cost]], Cost] | None
    version: int = 1
    """The module's `VERSION`."""


def load(uses: str, *, file: object = None, key: str | None = None) -> Stage:
    """Import the module that `uses` names; its heavy imports are inside `run`, so this is quick.

    Raises:
        UserError: there is no such module, or it is no stage.
    """
    if not _spec(uses):
        known = {name for name, _ in find(*STAGE_PACKAGES, uses.partition(".")[0])}
        raise UserError(f"no stage {uses!r}", file=file, key=key, hint=nearest(uses, known))
    module = importlib.import_module(uses)
    config, run = getattr(module, "Config", None), getattr(module, "run", None)
    if not (isinstance(config, type) and issubclass(config, Config) and callable(run)):
        raise UserError(f"module {uses!r} is no stage: it needs `Config` and `run`", file=file, key=key)
    version = getattr(module, "VERSION", 1)
    if not isinstance(version, int):
        raise UserError(f"VERSION of {uses} must be a whole number, not {version!r}", file=file, key=key)
    return Stage(uses, config, run, getattr(module, "cost", None), version)


def find(*packages: str) -> Iterator[tuple[str, str]]:
    """The stages of these packages (default: `STAGE_PACKAGES`), each with the first line of its docstring."""
    for package in packages or STAGE_PACKAGES:
        spec = _spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).glob("*.py")):
                tree = ast.parse(path.read_text(encoding="utf-8"))
                names = {getattr(node, "name", "") for node in tree.body}
                if {"Config", "run", "main"} <= names:
                    yield f"{package}.{path.stem}", (ast.get_docstring(tree) or "").partition("\n")[0]


def _spec(name: str) -> ModuleSpec | None:
    """Where a module is found, in one of the three packages or in a user's own; None if there is none."""
    try:
        return importlib.util.find_spec(name) if all(map(str.isidentifier, name.split("."))) else None
    except (ModuleNotFoundError, ValueError):
        return None
