"""Tables and trees for the command line: plans, states, lineages, certificates."""

import math
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cordee import artifact, certificate, files, lineage, provenance
from cordee.artifact import Artifact
from cordee.display import duration, progress_line
from cordee.keys import Key
from cordee.lineage import Step
from cordee.plan import Plan, Planned
from cordee.prove import Proof

# Training speed of one core and of one GPU, for estimates without a measurement.
ROUGH_CORE_FLOPS_PER_S = 5e10
ROUGH_GPU_FLOPS_PER_S = 3e14
RUNNING_FOR_S = 60.0
WIDE = 100
STYLES = {
    "done": "green",
    "stale": "yellow",
    "ready": "cyan",
    "running": "bold cyan",
    "failed": "red",
    "stopped": "yellow",
}


def plan(out: Console, made: Plan) -> None:
    """Print a plan: its table, the keys that changed, and what could not be checked."""
    out.print(_plan_table(made, out.width))
    for line in _plan_notes(made):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _plan_table(plan: Plan, width: int) -> Table:
    """A row per stage: state, tokens, FLOPs, parameters, memory, time; on a wide terminal also its module."""
    is_wide = width >= WIDE
    table = Table(title=f"{plan.recipe.name}  ({plan.recipe.file}, seed {plan.recipe.seed})", title_justify="left")
    for name in ("stage", *(["uses"] if is_wide else []), "state"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "params", "FLOPs", "memory", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    measured = _measured(plan)
    for planned in plan.stages:
        cost, made = planned.cost, planned.artifact
        table.add_row(
            planned.name,
            *([planned.item.stage.uses] if is_wide else []),
            Text(planned.state, STYLES[planned.state]) + Text(f" @{made.manifest['version']}" if made else "", "dim"),
            _count(cost.tokens),
            _count(cost.parameters),
            f"{cost.flops:.2g}" if cost.flops else "",
            f"{cost.memory_bytes / 1e9:.1f} GB" if cost.memory_bytes else "",
            _time(planned, measured),
        )
    return table


def _plan_notes(plan: Plan) -> Iterator[str]:
    """The lines below the table: the keys that changed, and what could not be checked."""
    for planned in plan.stages:
        if planned.why:
            yield f"{planned.name} is {planned.state}: {'; '.join(planned.why)}"
        if planned.artifact and planned.artifact.manifest["recipe"] != plan.recipe.name:
            yield f"{planned.name} is published as {planned.artifact.name}"
    for package in plan.recipe.unchecked:
        yield f"{package} is not installed here: its keys are checked when the stage starts"
    if any(planned.cost.seconds is None and planned.cost.flops for planned in plan.stages):
        yield "times: ~ from an earlier run on this machine, ≈ a rough estimate"


@dataclass
class _Measured:
    """Measurements of one kind of stage on this machine, to estimate its next time."""

    flops: float = 0.0
    """Of the largest run: a small one spends most of its time on starting."""
    seconds: float = 0.0
    """Of the same run."""
    least_seconds: float = math.inf
    """Of the shortest run: a lower bound."""


def _measured(plan: Plan) -> dict[str, _Measured]:
    """The measurements of each kind of stage on this machine, from all recipes."""
    here = provenance.host()["name"]
    found: dict[str, _Measured] = defaultdict(_Measured)
    for made in plan.store.everything(plan.recipe.name):
        flops, seconds = made.manifest["metrics"].get("flops"), made.manifest["seconds"]
        if flops and seconds and made.manifest["host"]["name"] == here:
            known = found[made.manifest["uses"]]
            known.least_seconds = min(known.least_seconds, seconds)
            if flops > known.flops:
                known.flops, known.seconds = flops, seconds
    return found


def _time(planned: Planned, measured: dict[str, _Measured]) -> str:
    """The time that a stage took, or an estimate."""
    if planned.cost.seconds is not None:
        return duration(planned.cost.seconds)
    if not planned.cost.flops:
        return ""
    if known := measured.get(planned.item.stage.uses):
        return f"~{duration(max(planned.cost.flops / known.flops * known.seconds, known.least_seconds))}"
    host = provenance.host()
    rough = ROUGH_GPU_FLOPS_PER_S if host["gpu"] else ROUGH_CORE_FLOPS_PER_S * host["cores"]
    return f"≈{duration(planned.cost.flops / rough)}"


def _count(number: float | None) -> str:
    """A count with three digits: `5.4M`."""
    if number is None:
        return ""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def status_table(plan: Plan) -> Table:
    """A row per stage: its state and its last message."""
    table = Table(title=plan.recipe.name, title_justify="left")
    for name in ("stage", "state", "last message"):
        table.add_column(name, overflow="fold")
    for planned in plan.stages:
        state, said = _status(plan, planned)
        table.add_row(planned.name, Text(state, STYLES[state]), Text(said))
    return table


def _status(plan: Plan, planned: Planned) -> tuple[str, str]:
    """The state of a stage and its last message."""
    if planned.artifact:
        return "done", f"{planned.artifact.name}, {duration(planned.artifact.manifest['seconds'])}"
    work = plan.store.work_folders(plan.recipe.name, planned.name, planned.fingerprint)
    events = files.read_json_lines(work.logs / "events.jsonl") if work.out.exists() else []
    if not events:
        return planned.state, "; ".join(planned.why)
    start = max(index for index, event in enumerate(events) if event["event"] == "start")
    first = next((event for event in events[start:] if event["event"] == "progress"), None)
    last = events[-1]
    said = last.get("text") or (progress_line(last, first) if first and last["event"] == "progress" else "starts")
    if last["event"] == "error":
        return ("stopped" if last["exit_code"] == 130 else "failed"), said
    lock = plan.store.root / plan.recipe.name / f".{planned.name}.lock"
    is_running = lock.exists() and time.time() - lock.stat().st_mtime < RUNNING_FOR_S
    return ("running" if is_running else "stopped"), said


def lineage_tree(steps: Iterable[Step]) -> Tree:
    """A lineage as a tree."""
    branches: list[Tree] = []
    for step in steps:
        if step.artifact:
            made = step.artifact
            label = f"{made.name}  {made.manifest['uses']}  {made.fingerprint[:12]}  {made.manifest['started'][:10]}"
            label += "".join(
                f"\n  licence: {name} ({count:,} documents)" for name, count in lineage.licences(made).items()
            )
        else:
            label = f"{step.file}  sha256 {step.sha256[:12]}"
        text = Text(f"{step.key}: {label}" if step.key else label)
        branches = branches[: step.depth]
        branches.append(branches[-1].add(text) if branches else Tree(text))
    return branches[0]


def left_out(out: Console, proofs: Iterable[Proof]) -> None:
    """Print which proofs do not apply to a recipe."""
    for proof in proofs:
        out.print(f"{proof.name}: not run, no stage uses {proof.proves}", highlight=False, soft_wrap=True)


def proof(out: Console, made: Artifact) -> None:
    """Print a certificate: its claim, and the value and limit of each check."""
    held = certificate.read(made.path)
    out.print(f"{made.name}: {held.claim}", markup=False, highlight=False, soft_wrap=True)
    for check in held.checks:
        mark = "passed" if check.passed else "FAILED"
        line = f"  {mark}  {check.name}: {certificate.shown(check.value)} (limit {check.limit})"
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def verify(out: Console, chosen: Iterable[Artifact]) -> bool:
    """Compare artifacts with their manifests and print what differs; returns whether all are intact."""
    all_whole = True
    for made in chosen:
        lines = list(artifact.verify(made))
        all_whole = all_whole and not lines
        out.print(f"{'damaged' if lines else 'whole':<8} {made.name}", highlight=False)
        for line in lines:
            out.print(f"         {line}", markup=False, highlight=False, soft_wrap=True)
    return all_whole


def stages(out: Console, found: Iterable[tuple[str, str]]) -> None:
    """Print stages, each with the first line of its docstring."""
    for uses, said in found:
        out.print(f"{uses:<26} {said}", markup=False, highlight=False, soft_wrap=True)


def keys(out: Console, listed: Iterable[Key]) -> None:
    """Print keys as a recipe spells them, with type, default and meaning."""
    for key in listed:
        out.print(f"[bold]{escape(key.name)}[/]: {escape(key.kind)}", highlight=False, soft_wrap=True)
        indent = 4 * " "
        said = textwrap.fill(key.meaning, out.width, initial_indent=indent, subsequent_indent=indent)
        out.print(said, markup=False, highlight=False)


def reports(out: Console, made: Iterable[Artifact]) -> None:
    """Print the paths of the reports."""
    for item in made:
        if (item.path / "index.html").exists():
            out.print(f"report: {item.path / 'index.html'}", markup=False, highlight=False, soft_wrap=True)
