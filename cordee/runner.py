"""Runs a plan: each stage that is not done is started, watched and published."""

import contextlib
import datetime as dt
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator

import yaml
from rich.console import Console

from cordee import attempt, events, files, hub, launchers, units
from cordee.artifact import Artifact
from cordee.display import Display
from cordee.errors import CordeeError, Fault, Stopped, UserError
from cordee.launchers import Job, command, local
from cordee.lock import Held
from cordee.plan import Plan, Planned, in_recipe
from cordee.work import Work

POLL_S = 0.2
STOP_GRACE_S = 90.0


def run(plan: Plan, out: Console, only: set[str] | None = None, proves: str | None = None) -> dict[str, Artifact]:
    """Run every stage that is not done, or those in `only`, in order.

    Args:
        plan: what to run.
        out: where progress is shown.
        only: names of the stages to run; their inputs have to be done.
        proves: for a proof, which is the last stage, the fingerprint of the stage that it examines.

    Returns:
        The artifact of each stage that is done now.

    Raises:
        CordeeError: a stage failed or was stopped; what came before it stays published.
    """
    keep_recipe(plan)
    artifacts = {planned.name: planned.artifact for planned in plan.stages if planned.artifact}
    with Display(out) as display:
        for planned in plan.stages:
            if planned.name in artifacts or (only is not None and planned.name not in only):
                continue
            label = proves if planned is plan.stages[-1] else None
            artifacts[planned.name] = _run_stage(plan, planned, artifacts, display, label)
    return artifacts


def _run_stage(
    plan: Plan, planned: Planned, artifacts: dict[str, Artifact], display: Display, proves: str | None
) -> Artifact:
    """Run one stage and publish it."""
    with attempt.begin(plan, planned, artifacts, proves) as current:
        if isinstance(current, Artifact):
            return current
        argv = command.of_stage(planned.item.stage.uses, planned.config, current.work.job.resolve())
        display.begin(planned.name, current.announce())
        try:
            environment = launchers.environment() | launchers.caches(plan.store.root)
            memory = _watch(Job(argv, environment, current.work.log), current.work, display, current.lock)
        except Stopped:
            raise
        except CordeeError as error:
            raise in_recipe(plan.recipe, planned.item, error) from error
        published = current.publish(files.read_json(current.work.result), memory)
        display.end(f"published {published.name} after {units.duration(published.manifest.seconds)}")
        return published


def _watch(job: Job, work: Work, display: Display, held: Held) -> int:
    """Start a job and show its events until it ends; returns its peak memory in bytes.

    Raises:
        CordeeError: it failed or was stopped, or another run took the stage over.
    """
    tail = events.Tail(work.events)
    with _signals():
        process = local.start(job)
        try:
            usage, was_stopped = _until_end(process, tail, work, display, held)
        except BaseException:  # whatever ends this run (a broken pipe, a full disk), no stage may continue without it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    _raise_for(process.returncode, tail, work, was_stopped=was_stopped)
    return usage.ru_maxrss * 1024


def _until_end(
    process: subprocess.Popen[bytes], tail: events.Tail, work: Work, display: Display, held: Held
) -> tuple[resource.struct_rusage, bool]:
    """Show a job's events until it ends; returns what it used, and whether it was asked to stop."""
    stop_at: float | None = None
    while True:
        try:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            for event in tail.read():
                display.event(event)
            display.tick()
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return usage, stop_at is not None
            if held.lost.is_set():
                held.require()
            if stop_at and time.monotonic() > stop_at:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            stop_at = _ask_to_stop(work, display, stop_at)


def _ask_to_stop(work: Work, display: Display, stop_at: float | None) -> float:
    """Ask a job to save and end; a second time, end it at once. Returns when it will be killed."""
    if stop_at is not None:
        return time.monotonic()
    work.stop.touch()
    display.say(f"stopping: its state is saved first, at most {STOP_GRACE_S:.0f} s (Ctrl-C again ends it at once)")
    return time.monotonic() + STOP_GRACE_S


def _raise_for(exit_code: int, tail: events.Tail, work: Work, *, was_stopped: bool) -> None:
    """Raise the error that a job ended with, if it did."""
    for event in tail.seen:
        if event["event"] == "error":
            raise events.error_of(event)
    if was_stopped:
        raise Stopped("stopped; the next run continues from the last state that was saved")
    if exit_code != 0:
        text = work.log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        said = lines[-1] if lines else "its log is empty"
        raise Fault(f"the stage ended with exit code {exit_code}: {said}", file=work.log)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and the end of the terminal (SIGHUP) end a run as Ctrl-C does; under nohup(1) it continues."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_recipe(plan: Plan) -> None:
    """Store the resolved recipe with the run, and its lock, if it refers to the hub."""
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
    path = plan.store.root / plan.recipe.name / "logs" / f"{now}.recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    if (lock := hub.lock_file(plan.recipe.file)).is_file():
        files.write_text(hub.lock_file(path), lock.read_text(encoding="utf-8"))
    files.write_text(path, yaml.safe_dump(plan.recipe.document, sort_keys=False, allow_unicode=True))


def require_frozen(plan: Plan) -> None:
    """Refuse a plan of which a stage is not done.

    Raises:
        UserError: names the first such stage, and why.
    """
    for planned in plan.stages:
        if planned.state != "done":
            why = "; ".join(planned.why) or "it was never made"
            raise UserError(f"is {planned.state}: {why}", file=plan.recipe.file, key=f"stages.{planned.name}")
