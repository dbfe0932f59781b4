"""Walks a plan: for each stage that is not done, lock, check the inputs, launch, watch, publish."""

import contextlib
import datetime as dt
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cordee import artifact, config, files, identity, lock, provenance
from cordee.artifact import Artifact, Work
from cordee.display import Display, duration
from cordee.errors import Fault, Stopped, UserError
from cordee.launchers import RUNNER, Job, command, local
from cordee.plan import Plan, Planned, content, in_recipe

POLL_S = 0.2
STOP_GRACE_S = 90.0


def run(plan: Plan, out: Console, only: set[str] | None = None, proves: str | None = None) -> dict[str, Artifact]:
    """Make every stage that is not done, or those in `only`, in order.

    Args:
        plan: what to run.
        out: where progress is shown.
        only: names of the stages to make; their inputs have to be done.
        proves: the fingerprint of the stage that the last stage is a certificate for.

    Returns:
        The artifact of each stage that is done now.

    Raises:
        CordeeError: a stage failed or was stopped; what came before it stays published.
    """
    _keep_recipe(plan)
    made = {planned.name: planned.artifact for planned in plan.stages if planned.artifact}
    with Display(out) as display:
        for planned in plan.stages:
            if planned.name in made or (only is not None and planned.name not in only):
                continue
            label = proves if planned is plan.stages[-1] else None
            made[planned.name] = run_stage(plan, planned, made, display, label)
    return made


def run_stage(
    plan: Plan, planned: Planned, made: dict[str, Artifact], display: Display, proves: str | None = None
) -> Artifact:
    """Make one stage, in this recipe's folder, and publish it."""
    folder = plan.store.root / plan.recipe.name
    with lock.hold(folder / f".{planned.name}.lock"):
        # Another run may have published it between planning and locking.
        for other in plan.store.artifacts(plan.recipe.name):
            if other.fingerprint == planned.fingerprint:
                return other
        work = plan.store.work_folders(plan.recipe.name, planned.name, planned.fingerprint)
        work.out.mkdir(parents=True, exist_ok=True)
        paths = resolve(plan, planned, made)
        values = config.resolved(planned.config, paths)
        write_job(plan, planned, work, values)
        argv = command.of_stage(planned.item.stage.uses, planned.config, work.job.resolve())
        environment = {
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",  # a folder `eval/` where the user stands is not the code that was planned
            RUNNER: json.dumps(lock.owner(os.getpid())),
        }
        job = Job(argv, environment, work.logs / "log.txt")
        display.begin(planned.name, f"starts as {plan.recipe.name}/{planned.name}@{work.version}")
        told = manifest(plan, planned, made)  # before it starts: what stands there hours later is not what ran
        memory = _watch(job, work, display, lambda error: in_recipe(plan.recipe, planned.item, error))
        seconds = worked_s(work)
        record = told | {
            "metrics": files.read_json(work.logs / "result.json"),
            "proves": proves,
            "seconds": round(seconds, 3),
            "peak_memory_bytes": memory,
        }
        published = artifact.publish(work, record)
        display.end(f"published {published.name} after {duration(seconds)}")
        return published


def resolve(plan: Plan, planned: Planned, made: dict[str, Artifact]) -> dict[str, str]:
    """The path of each input, after its files were hashed again.

    Raises:
        UserError: an input is not made yet, or has no such place.
        Fault: an input's files are not what was published or planned.
    """
    paths = {}
    for key, source in planned.sources.items():
        place = f"stages.{planned.name}.{key}"
        if found := made.get(source.stage) if source.stage else source.artifact:
            path = found.at(source.place, file=plan.recipe.file, key=place)
            if damage := next(artifact.verify(found, source.place), None):
                hint = f"move {found.path} away and run again to make it anew"
                raise Fault(f"{damage}", file=plan.recipe.file, key=place, hint=hint)
        elif source.path:
            path = source.path
            if not path.exists() or source.identity != f"content {content(path)}":
                hint = "run again: it is planned anew with what stands there now"
                raise Fault(f"{path} changed since the plan was made", file=plan.recipe.file, key=place, hint=hint)
        else:
            hint = f"run it first: cordee run {plan.recipe.file}"
            raise UserError(f"{source.stage} is not made yet", file=plan.recipe.file, key=place, hint=hint)
        paths[key] = str(path.absolute())  # not resolved: a link's name says what kind of file it is
    return paths


def write_job(plan: Plan, planned: Planned, work: Work, values: dict[str, Any]) -> dict[str, Any]:
    """Write what the stage's process is told; an earlier attempt's flag and result end here."""
    work.logs.mkdir(parents=True, exist_ok=True)
    (work.logs / "stop").unlink(missing_ok=True)
    (work.logs / "result.json").unlink(missing_ok=True)
    told = {
        "uses": planned.item.stage.uses,
        "config": values,
        "seed": plan.recipe.seed,
        "out": str(work.out.resolve()),
        "events": str((work.logs / "events.jsonl").resolve()),
        "fingerprint": planned.fingerprint,
    }
    files.write_json(work.job, told)
    return told


def _watch(job: Job, work: Work, display: Display, name: Callable[[str], str]) -> int:
    """Start a job and show its events until it ends; returns its peak memory in bytes.

    Raises:
        CordeeError: it failed or was stopped; `name` puts the stage's name before what it said.
    """
    tail = begin_events(work)
    with _signals():
        process = local.start(job)
        try:
            usage, was_stopped = _until_end(process, tail, work, display)
        except BaseException:  # whatever ends this run (a broken pipe, a full disk), no stage may go on without it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    _raise_for(process.returncode, tail, work, name, was_stopped=was_stopped)
    return usage.ru_maxrss * 1024


def _until_end(
    process: subprocess.Popen[bytes], tail: "Tail", work: Work, display: Display
) -> tuple[resource.struct_rusage, bool]:
    """Show a job's events until it ends; returns what it used, and whether it was asked to stop."""
    stop_at: float | None = None
    while True:
        try:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            for event in tail.read():
                display.event(event)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return usage, stop_at is not None
            if stop_at and time.monotonic() > stop_at:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            stop_at = _ask_to_stop(work, display, stop_at)


def _ask_to_stop(work: Work, display: Display, stop_at: float | None) -> float:
    """Ask a job to save and end; a second time, end it at once. Returns when it will be ended."""
    if stop_at is not None:
        return time.monotonic()
    (work.logs / "stop").touch()
    display.say(f"stopping: its state is saved first, at most {STOP_GRACE_S:.0f} s (Ctrl-C again ends it at once)")
    return time.monotonic() + STOP_GRACE_S


def _raise_for(exit_code: int, tail: "Tail", work: Work, name: Callable[[str], str], *, was_stopped: bool) -> None:
    """Turn a job's end into this run's end, if it was not a good one."""
    errors = [event for event in tail.seen if event["event"] == "error"]
    kinds = {kind.exit_code: kind for kind in (UserError, Fault, Stopped)}
    if errors:
        kind, text = kinds.get(errors[0]["exit_code"], Fault), errors[0]["text"]
        raise kind(text if kind is Stopped else name(text))
    if was_stopped:
        raise Stopped("stopped; the next run goes on from the last state that was saved")
    if exit_code != 0:
        log = work.logs / "log.txt"
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        said = lines[-1] if lines else "it said nothing"
        raise Fault(f"the stage ended with exit code {exit_code}: {said}", file=log)


def begin_events(work: Work) -> "Tail":
    """Mark the beginning of an attempt in a stage's events, and read from there."""
    events = work.logs / "events.jsonl"
    with events.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "start", "time": time.time()}) + "\n")
    return Tail(events, events.stat().st_size)


class Tail:
    """Reads the whole lines that were appended to a file since it was last asked."""

    def __init__(self, path: Path, offset: int) -> None:
        self.path, self.offset = path, offset
        self.seen: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """The rows that are new."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        rows = [json.loads(line) for line in whole.splitlines()]
        self.seen += [row for row in rows if row["event"] != "progress"]
        return rows


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and the end of the terminal (SIGHUP) end a run as Ctrl-C does; under nohup(1) it goes on."""

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


def worked_s(work: Work) -> float:
    """The seconds that all attempts at a stage took, up to the last thing that each one said."""
    total, start, last = 0.0, None, 0.0
    for event in files.read_json_lines(work.logs / "events.jsonl"):
        if event["event"] == "start":
            total += last - start if start is not None else 0.0
            start = event["time"]
        last = event["time"]
    return total + (time.time() - start if start is not None else 0.0)


def manifest(plan: Plan, planned: Planned, made: dict[str, Artifact]) -> dict[str, Any]:
    """What an artifact says of itself, as far as it is known when its stage starts."""
    return {
        "recipe": plan.recipe.name,
        "stage": planned.name,
        "uses": planned.item.stage.uses,
        "fingerprint": planned.fingerprint,
        "identity": planned.identity,
        "execution": identity.execution(planned.config),
        "inputs": list(_inputs(planned, made)),
        "started": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        **provenance.collect(Path(str(sys.modules[planned.item.stage.uses].__file__))),
    }


def _inputs(planned: Planned, made: dict[str, Artifact]) -> Iterator[dict[str, str]]:
    """What a stage read: artifacts by name and fingerprint, files by path and hash."""
    for key, source in planned.sources.items():
        found = made.get(source.stage) if source.stage else source.artifact
        if found:
            yield {"key": key, "artifact": found.name, "path": source.place, "fingerprint": found.fingerprint}
        else:
            value = str(dict(config.inputs(planned.config))[key])
            yield {"key": key, "file": value, "sha256": source.identity.removeprefix("content ")}


def _keep_recipe(plan: Plan) -> None:
    """Store the resolved recipe with the run."""
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H-%M-%S")
    path = plan.store.root / plan.recipe.name / "logs" / f"{now}.recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, yaml.safe_dump(plan.recipe.document, sort_keys=False, allow_unicode=True))


def require_frozen(plan: Plan) -> None:
    """Refuse a plan in which anything differs from what was made.

    Raises:
        UserError: names the first stage that differs, and why.
    """
    for planned in plan.stages:
        if planned.state != "done":
            why = "; ".join(planned.why) or "it was never made"
            raise UserError(f"is {planned.state}: {why}", file=plan.recipe.file, key=f"stages.{planned.name}")
