"""Runs a plan: each stage that is not done is started, watched and published.

Stages run one after the other, unless `jobs` says how many may run at once. A further stage then starts beside those
that run where what it reads is published, the GPUs that it needs are free, and its memory, as planned, is available.
"""

import contextlib
import datetime as dt
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

from cordee import (
    advice,
    attempt,
    cluster,
    events,
    files,
    goodput,
    hub,
    launchers,
    machine,
    signals,
    supervisor,
    units,
)
from cordee.artifact import Artifact
from cordee.attempt import Attempt
from cordee.cluster import Cluster, Needs
from cordee.display import Display
from cordee.errors import CordeeError, Fault, Stopped, UserError
from cordee.launchers import Job, command, local, slurm
from cordee.plan import Plan, Planned, in_recipe
from cordee.supervisor import Supervised

POLL_S = 0.2
STOP_GRACE_S = 90.0


@dataclass(frozen=True)
class Where:
    """On what a plan runs."""

    cluster: Cluster = cluster.HERE
    """On a Slurm cluster, this is one of its jobs."""
    jobs: int = 1
    """Stages that may run at once."""
    restarts: int = supervisor.RESTARTS
    """How often a stage that failed without a fault of its own is started again before it is a step further."""


@dataclass(frozen=True)
class _Running:
    """A stage that was started."""

    planned: Planned
    attempt: Attempt
    handle: Supervised
    tail: events.Tail
    end: contextlib.ExitStack
    """Gives its lock back."""
    gpus: tuple[str, ...]


def run(
    plan: Plan, out: Console, only: set[str] | None = None, proves: str | None = None, where: Where | None = None
) -> dict[str, Artifact]:
    """Run every stage that is not done, or those in `only`.

    Args:
        plan: what to run.
        out: where progress is shown.
        only: names of the stages to run; their inputs have to be done.
        proves: for a proof, which is the last stage, the fingerprint of the stage that it examines.
        where: on what it runs; by default this machine, one stage after the other.

    Returns:
        The artifact of each stage that is done now.

    Raises:
        CordeeError: a stage failed or was stopped. What else runs then is awaited and published; what was published
            stays so.
    """
    keep_recipe(plan)
    with Display(out) as display, signals.as_interrupts():
        made = _Run(plan, display, where or Where(), only, proves)
        try:
            made.to_end()
        finally:  # whatever ends this run (a broken pipe, a full disk), no stage may continue without it
            made.kill()
    return {planned.name: made.artifacts[planned.name] for planned in plan.stages if planned.name in made.artifacts}


class _Run:
    """The stages of a plan that wait, that run, and that are done."""

    def __init__(self, plan: Plan, display: Display, where: Where, only: set[str] | None, proves: str | None) -> None:
        self.plan, self.display, self.where, self.proves = plan, display, where, proves
        self.artifacts = {planned.name: planned.artifact for planned in plan.stages if planned.artifact}
        self.chosen = {planned.name for planned in plan.stages if only is None or planned.name in only}
        undone = self.chosen - self.artifacts.keys()
        self.waiting = [planned for planned in plan.stages if planned.name in undone]
        self.available_bytes = machine.available_bytes()
        self.running: list[_Running] = []
        self.error: CordeeError | None = None
        """What the first stage that failed ended with."""
        self.stop_at: float | None = None
        """Once they were asked to stop, when those that still run are killed."""

    def to_end(self) -> None:
        """Start, watch and publish until nothing runs and nothing more can be started.

        Raises:
            CordeeError: a stage failed or was stopped.
        """
        while True:
            while self.error is None and self.stop_at is None and (planned := self._next()):
                self.waiting.remove(planned)
                try:
                    self._start(planned)
                except CordeeError as error:
                    self._keep(planned, error)
            if not self.running:
                break
            try:
                self._watch()
            except KeyboardInterrupt:
                self._ask_to_stop()
        if self.error:
            raise self.error
        if self.stop_at is not None and not self.chosen <= self.artifacts.keys():
            raise Stopped("stopped; the next run continues from the last state that was saved")

    def kill(self) -> None:
        """End what still runs, at once."""
        for one in self.running:
            with one.end:
                one.handle.kill()

    def _next(self) -> Planned | None:
        """A stage that can start now."""
        coming = {planned.name for planned in [*self.waiting, *(one.planned for one in self.running)]}
        ready = (planned for planned in self.waiting if coming.isdisjoint(planned.item.needs))
        if not self.running:
            return next(ready, None)
        if len(self.running) >= self.where.jobs:
            return None
        free = self.available_bytes - sum(_memory(one.planned) for one in self.running)
        return next((one for one in ready if self._free_gpus(one) is not None and _memory(one) <= free), None)

    def _free_gpus(self, planned: Planned) -> tuple[str, ...] | None:
        """GPUs for a stage that no other has; None where there are too few."""
        taken = {gpu for one in self.running for gpu in one.gpus}
        free = [gpu for gpu in machine.visible_gpus() if gpu not in taken]
        asked = planned.item.resources.gpus
        needed = planned.config.num_gpus() if asked is None else asked
        return tuple(free[:needed]) if needed <= len(free) or not machine.visible_gpus() else None

    def _start(self, planned: Planned) -> None:
        """Begin an attempt at a stage and start its job, unless another run has published it."""
        label = self.proves if planned is self.plan.stages[-1] else None
        with contextlib.ExitStack() as end:
            is_job = self.where.cluster.kind == "slurm"  # which awaits a run of a dead node, seen to be gone by minutes
            current = end.enter_context(attempt.begin(self.plan, planned, self.artifacts, label, waits=is_job))
            if isinstance(current, Artifact):
                self.artifacts[planned.name] = current
                return
            needs = needs_of(self.plan, planned, self.where.cluster)
            gpus = self._free_gpus(planned) or () if self.where.jobs > 1 else ()
            argv = command.of_stage(planned.item.stage.uses, planned.config, current.work.job.resolve(), needs.nodes)
            environment = launchers.environment() | launchers.caches(self.plan.store.root)
            environment |= _limits(planned, gpus)
            job = Job(planned.name, argv, environment, current.work.log, current.work.stop, needs.nodes, needs.cores)
            tail = events.Tail(current.work.events)
            self.display.begin(planned.name, current.announce())
            start = slurm.start_on(self.where.cluster) if is_job else local.start
            handle = Supervised(start, job, current.work, self.where.restarts)
            self.running.append(_Running(planned, current, handle, tail, end.pop_all(), gpus))

    def _watch(self) -> None:
        """Show what is new of the stages that run, and publish those that have ended."""
        for one in list(self.running):
            exit_code = one.handle.poll()
            for event in one.tail.read():
                self.display.event(one.planned.name, event)
            if exit_code is not None:
                self.running.remove(one)
                with one.end:
                    self._end(one)
            elif one.attempt.lock.lost.is_set():  # another run has taken it over
                self.running.remove(one)
                with one.end:
                    one.handle.kill()
                    self._end(one)
            elif self.stop_at and time.monotonic() > self.stop_at:
                one.handle.kill()
        self.display.tick()
        time.sleep(POLL_S)

    def _end(self, one: _Running) -> None:
        """Publish a stage that has ended, or keep its error."""
        try:
            one.attempt.lock.require()
            if ended := _error(one, was_stopped=self.stop_at is not None):
                raise ended if isinstance(ended, Stopped) else in_recipe(self.plan.recipe, one.planned.item, ended)
            published = one.attempt.publish(files.read_json(one.attempt.work.result), one.handle.usage())
        except CordeeError as error:
            self.display.end(one.planned.name, "stopped" if isinstance(error, Stopped) else "failed")
            self._keep(one.planned, error)
            return
        self.artifacts[one.planned.name] = published
        took, spent = units.duration(published.manifest.seconds), published.manifest.goodput
        said = f"; {told}" if spent and (told := goodput.told(spent)) else ""
        self.display.end(one.planned.name, f"published {published.name} after {took}{said}")

    def _keep(self, planned: Planned, error: CordeeError) -> None:
        """Keep the first error, to be raised once the stages that run have ended too."""
        if self.error is None:
            self.error = error
            if others := [one.planned.name for one in self.running]:
                rest = "which saves its state" if self.stop_at is not None else "which runs on"
                self.display.say(planned.name, f"{error}; awaits {', '.join(others)}, {rest}")

    def _ask_to_stop(self) -> None:
        """Ask what runs to save and end; a second time, end it at once."""
        if self.stop_at is not None:
            self.stop_at = time.monotonic()
            return
        self.stop_at = time.monotonic() + STOP_GRACE_S
        said = f"stopping: its state is saved first, at most {STOP_GRACE_S:.0f} s (Ctrl-C again ends it at once)"
        for one in self.running:
            one.handle.stop()
            self.display.say(one.planned.name, said)


def _memory(planned: Planned) -> float:
    """The bytes of this machine's memory that a stage needs, as far as that is known."""
    if planned.item.resources.memory_gb:
        return planned.item.resources.memory_gb * 1e9
    processes = getattr(planned.config, "processes", 1)
    return 0.0 if machine.has_gpu() else (planned.cost.memory_bytes or 0.0) * processes


def _limits(planned: Planned, gpus: tuple[str, ...]) -> dict[str, str]:
    """The variables that keep a stage to the cores that it asks for, and to its GPUs beside other stages."""
    found = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    if cores := planned.item.resources.cores:
        found["OMP_NUM_THREADS"] = str(max(1, cores // getattr(planned.config, "processes", 1)))
    return found


def _error(one: _Running, *, was_stopped: bool) -> CordeeError | None:
    """The error that a job ended with, if it did, and what to do about it.

    A job that was asked to stop and failed counts as stopped: what it consists of may have been ended before it.
    """
    cause, planned = one.handle.cause, one.planned
    stopped = "stopped; the next run continues from the last state that was saved"
    hints = [one.handle.advice, cause.hint]
    if cause.kind == "out of memory":
        hints = [advice.on_memory(planned.config, planned.cost, planned.estimate)]
    if error := next(iter(one.handle.errors), None):
        if was_stopped and not isinstance(error, Stopped):
            return Stopped(f"{stopped} ({error})")
        hints = [error.hint, *(hint for hint in hints if hint not in error.hint)]
        return type(error)(error.problem, file=error.file, key=error.key, hint="; ".join(filter(None, hints)))
    if cause.kind == "finished":
        return None
    if was_stopped or cause.kind == "stopped":
        return Stopped(stopped)
    return Fault(f"{cause.kind}: {cause.text}", file=one.attempt.work.log, hint="; ".join(filter(None, hints)))


def needs_of(plan: Plan, planned: Planned, on: Cluster) -> Needs:
    """What a stage takes of a cluster.

    Raises:
        UserError: the cluster does not have it.
    """
    return on.needs(planned.config, planned.item.resources, (plan.recipe.file, f"stages.{planned.name}"))


def keep_recipe(plan: Plan) -> Path:
    """Store the resolved recipe with the run, and its lock, if it refers to the hub; a job's is stored already."""
    folder = plan.store.root / plan.recipe.name / "logs"
    if plan.recipe.file.absolute().parent == folder.absolute():
        return plan.recipe.file
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
    path = folder / f"{now}.recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    if (lock := hub.lock_file(plan.recipe.file)).is_file():
        files.write_text(hub.lock_file(path), lock.read_text(encoding="utf-8"))
    files.write_text(path, yaml.safe_dump(plan.recipe.document, sort_keys=False, allow_unicode=True))
    return path


def require_frozen(plan: Plan) -> None:
    """Refuse a plan of which a stage is not done.

    Raises:
        UserError: names the first such stage, and why.
    """
    for planned in plan.stages:
        if planned.state != "done":
            why = "; ".join(planned.why) or "it was never made"
            raise UserError(f"is {planned.state}: {why}", file=plan.recipe.file, key=f"stages.{planned.name}")
