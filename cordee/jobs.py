"""The Slurm jobs of a recipe's stages: which wait or run, what became of the others, and their end.

Slurm knows a job by a key made of its stage's fingerprint and the folder of the artifacts: a stage that is in the queue
is not submitted twice, whoever wrote its recipe. `logs/jobs.jsonl` lists what was submitted.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cordee import events, files
from cordee.artifact import Store
from cordee.errors import CordeeError
from cordee.launchers.slurm import told
from cordee.plan import Plan, Planned

LIVE = {
    *("PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"),
    *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"),
}
"""The states of jobs that will do something yet."""
REASONS = {
    "Resources": "nodes are not free",
    "Priority": "other jobs come first",
    "BeginTime": "it was requeued, and starts again soon",
    "JobHeldUser": "it is held by its user",
    "JobHeldAdmin": "it is held by an administrator",
}
"""Why a job waits, for some of Slurm's own words."""


@dataclass(frozen=True)
class Queued:
    """A job in Slurm's queue."""

    number: str
    state: str
    reason: str
    """Why it waits, in Slurm's words."""


def key_of(store: Store, planned: Planned) -> str:
    """By what Slurm knows the job of a stage: its identity and where it is published."""
    text = f"{store.root.resolve()}\n{planned.fingerprint}"
    return f"cordee:{hashlib.sha256(text.encode()).hexdigest()[:40]}"


def queued() -> dict[str, Queued]:
    """This user's jobs that wait or run, by their keys.

    Raises:
        UserError: Slurm is not installed here.
        Fault: it does not answer.
    """
    lines = told("squeue", "--me", "--noheader", "--format=%i|%T|%r|%k").splitlines()
    found = [line.split("|", 3) for line in lines]
    return {key.strip(): Queued(number, state, reason) for number, state, reason, key in found if state in LIVE}


def add(plan: Plan, planned: Planned, number: str) -> None:
    """Note that a stage was submitted."""
    row = {"stage": planned.name, "job": number, "fingerprint": planned.fingerprint, "time": time.time()}
    events.append_row(_list_file(plan), row)


def submitted(plan: Plan) -> dict[str, str]:
    """The number of the last job of each stage, as it is planned now."""
    now = {planned.name: planned.fingerprint for planned in plan.stages}
    file = _list_file(plan)
    rows = files.read_json_lines(file) if file.exists() else []
    return {row["stage"]: row["job"] for row in rows if now.get(row["stage"]) == row["fingerprint"]}


def why_it_waits(plan: Plan, planned: Planned, job: Queued) -> str:
    """Why a job waits."""
    if job.reason.startswith("Dependency"):
        return f"it needs {', '.join(plan.awaited(planned))}"
    return REASONS.get(job.reason, job.reason)


def end_of(number: str) -> str:
    """How a job ended, as far as Slurm still knows: by its accounting, or in the first minutes by its controller."""
    try:
        rows = told("sacct", "--jobs", number, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode")
        state, exit_code = rows.splitlines()[-1].split("|")
    except (CordeeError, IndexError, ValueError):
        try:
            shown = dict(_fields(told("scontrol", "--oneliner", "show", "job", number)))
        except CordeeError:
            return "no longer known to Slurm"
        state, exit_code = shown["JobState"], shown["ExitCode"]
    return f"{state.lower()}, exit code {exit_code.partition(':')[0]}"


def cancel(plan: Plan, stage: str | None = None) -> Mapping[str, str]:
    """Cancel the jobs of a recipe or of one stage; what waits for one of them is cancelled by Slurm.

    Those that run are told by their script to save and end, which may take longer than Slurm's own KillWait.

    Returns:
        The number of each job that was cancelled, by its stage.
    """
    chosen = [plan.stage(stage)] if stage else plan.stages
    queue = queued()
    found = {one.name: queue[key] for one in chosen if (key := key_of(plan.store, one)) in queue}
    if waiting := [job.number for job in found.values() if job.state != "RUNNING"]:
        told("scancel", *waiting)
    if running := [job.number for job in found.values() if job.state == "RUNNING"]:
        told("scancel", "--batch", "--signal=TERM", *running)
    return {stage: job.number for stage, job in found.items()}


def output(plan: Plan, stage: str) -> Path | None:
    """The file with the output of a stage's last job, outside the stage itself; None before it has started."""
    number = submitted(plan).get(stage)
    file = _list_file(plan).with_name(f"{stage}.{number}.out")
    return file if file.exists() else None


def _fields(text: str) -> list[tuple[str, str]]:
    """The words `Name=value` of scontrol."""
    return [(name, value) for name, _, value in (word.partition("=") for word in text.split())]


def _list_file(plan: Plan) -> Path:
    return plan.store.root / plan.recipe.name / "logs" / "jobs.jsonl"
