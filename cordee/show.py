"""Tables and trees for the command line: plans, states, lineages, certificates."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cordee import artifact, causes, certificate, events, files, jobs, lineage, lock, provenance, units
from cordee.artifact import Artifact, Damaged
from cordee.batch import Written
from cordee.clean import Item
from cordee.config import AccelerateConfig
from cordee.display import progress_line
from cordee.jobs import Queued
from cordee.keys import Key
from cordee.lineage import Step
from cordee.plan import Plan, Planned, measured
from cordee.prove import Proof
from cordee.sweep import Variant

# Training speed of one core and of one GPU, for estimates without a measurement; that of a GPU is 30 % of what an H100
# can do in bfloat16 (989e12), about what the Apertus models were trained at (arXiv 2509.14233, section 6).
ROUGH_CORE_FLOPS_PER_S = 5e10
ROUGH_GPU_FLOPS_PER_S = 3e14
WIDE = 100
STYLES = {
    "done": "green",
    "stale": "yellow",
    "ready": "cyan",
    "running": "bold cyan",
    "failed": "red",
    "stopped": "yellow",
    "waiting": "cyan",
}


def plan(out: Console, plan: Plan) -> None:
    """Print a plan: its table, the keys that changed, what is damaged, and what could not be checked."""
    out.print(_plan_table(plan, out.width))
    for line in _plan_notes(plan, out.width):
        out.print(line, highlight=False, soft_wrap=True)


def _plan_table(plan: Plan, width: int) -> Table:
    """A row per stage: state, tokens, FLOPs, parameters, memory, time; on a wide terminal also its module."""
    is_wide = width >= WIDE
    table = Table(title=f"{plan.recipe.name}  ({plan.recipe.file}, seed {plan.recipe.seed})", title_justify="left")
    for name in ("stage", *(["uses"] if is_wide else []), "state"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "params", "FLOPs", "memory", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for_gpus = _is_for_gpus(plan)
    measured = _measured(plan) if bool(provenance.host().gpu) == for_gpus else {}
    for planned in plan.stages:
        cost, version = planned.cost, planned.artifact and planned.artifact.manifest.version
        table.add_row(
            planned.name,
            *([planned.item.stage.uses] if is_wide else []),
            Text(planned.state, STYLES[planned.state]) + Text(f" @{version}" if version else "", "dim"),
            *(units.count(number) if number is not None else "" for number in (cost.tokens, cost.parameters)),
            f"{cost.flops:.2g}" if cost.flops else "",
            units.size(cost.memory_bytes) if cost.memory_bytes else "",
            _time(planned, measured, for_gpus=for_gpus),
        )
    return table


def _plan_notes(plan: Plan, width: int) -> Iterator[str]:
    """The lines below the table: the keys that changed, what is damaged, what could not be checked, what is assumed."""
    for planned in plan.stages:
        if planned.why:
            yield f"{planned.name} is {planned.state}: {'; '.join(planned.why)}"
        if planned.artifact and planned.artifact.manifest.recipe != plan.recipe.name:
            yield f"{planned.name} is published as {planned.artifact.name}"
    yield from damaged(plan)
    for package in plan.recipe.unchecked:
        yield f"{package} is not installed here: its keys are checked when the stage starts"
    if width >= WIDE:
        for planned in plan.stages:
            if planned.cost.memory:
                total, _, terms = str(planned.cost.memory).partition(" = ")
                yield f"{planned.name}: {total} a device = {terms}"
    for told in dict.fromkeys(one.cost.tokens_by for one in plan.stages if one.cost.tokens_by):
        yield f"tokens of {', '.join(one.name for one in plan.stages if one.cost.tokens_by == told)}: {told}"
    if any(planned.cost.seconds is None and planned.cost.flops for planned in plan.stages):
        yield f"times: ~ from an earlier run on this machine, ≈ {_assumed(plan)}"


def _assumed(plan: Plan) -> str:
    """What an estimate without a measurement rests on."""
    if _is_for_gpus(plan):
        return f"at {ROUGH_GPU_FLOPS_PER_S:.0e} FLOP/s a GPU, 30 % of an H100's peak".replace("e+", "e")
    return f"at {ROUGH_CORE_FLOPS_PER_S:.0e} FLOP/s a core of this machine".replace("e+", "e")


def _is_for_gpus(plan: Plan) -> bool:
    """Whether a recipe is for GPUs: this machine has one, or an accelerate configuration of a stage asks for them."""
    launches = [config.launch for one in plan.stages if isinstance(config := one.config, AccelerateConfig)]
    return bool(provenance.host().gpu) or any(one.config_file and one.devices().are_gpus for one in launches)


def damaged(plan: Plan) -> Iterator[str]:
    """The damaged artifacts in the store that the stages of the plan do not name, those of one kind in one line."""
    named = {planned.name for planned in plan.stages if planned.state != "done"}
    kinds: dict[str, list[str]] = defaultdict(list)
    for one in plan.damaged:
        if not any(one.is_of(plan.recipe.name, name) for name in named):
            kinds[one.problem].append(one.name)
    for problem, names in kinds.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{', '.join(names[:3])}{more} {'counts' if len(names) == 1 else 'count'} as not made: {problem}"


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
    here = provenance.host().name
    found: dict[str, _Measured] = defaultdict(_Measured)
    for one in plan.artifacts:
        flops, seconds = measured(one).flops, one.manifest.seconds
        if flops and seconds and one.manifest.host.name == here:
            known = found[one.manifest.uses]
            known.least_seconds = min(known.least_seconds, seconds)
            if flops > known.flops:
                known.flops, known.seconds = flops, seconds
    return found


def _time(planned: Planned, measured: dict[str, _Measured], *, for_gpus: bool = False) -> str:
    """The time that a stage took, or an estimate; where it is for GPUs, from the number of its own."""
    if planned.cost.seconds is not None:
        return units.duration(planned.cost.seconds)
    if not planned.cost.flops:
        return ""
    if known := measured.get(planned.item.stage.uses):
        return f"~{units.duration(max(planned.cost.flops / known.flops * known.seconds, known.least_seconds))}"
    rough = ROUGH_CORE_FLOPS_PER_S * provenance.host().cores
    if for_gpus:
        rough = ROUGH_GPU_FLOPS_PER_S * max(1, planned.config.num_gpus())
    return f"≈{units.duration(planned.cost.flops / rough)}"


def status(out: Console, plan: Plan, known: tuple[Mapping[str, str], Mapping[str, Queued]] | None = None) -> None:
    """Print how far each stage is, and what is damaged.

    Args:
        out: where it is printed.
        plan: the recipe's.
        known: the number of each stage's last job, and the jobs that wait or run, by their keys.
    """
    out.print(_status_table(plan, known or ({}, {})))
    for line in damaged(plan):
        out.print(line, highlight=False, soft_wrap=True)


def _status_table(plan: Plan, known: tuple[Mapping[str, str], Mapping[str, Queued]]) -> Table:
    """A row per stage: its state and its last message."""
    table = Table(title=plan.recipe.name, title_justify="left")
    for name in ("stage", "state", "last message"):
        table.add_column(name, overflow="fold")
    for planned in plan.stages:
        state, said = _with_job(plan, planned, _status(plan, planned), known)
        table.add_row(planned.name, Text(state, STYLES[state]), Text(said))
    return table


def _with_job(
    plan: Plan,
    planned: Planned,
    seen: tuple[str, str],
    known: tuple[Mapping[str, str], Mapping[str, Queued]],
) -> tuple[str, str]:
    """The state of a stage and its last message, with what Slurm says of its job."""
    numbers, queue = known
    (state, said), number = seen, numbers.get(planned.name)
    job = queue.get(jobs.key_of(plan.store, planned))
    if state == "done":
        return seen
    so_far = f"; {said}" if said and state in ("stopped", "failed", "running") else ""
    if job and job.state != "RUNNING":
        return "waiting", f"job {job.number}: {jobs.why_it_waits(plan, planned, job)}{so_far}"
    if job:
        return "running", f"job {job.number}: {said if state == 'running' else 'starts'}"
    if number and state != "running":
        return ("failed" if state == "ready" else state), f"job {number}: {jobs.end_of(number)}{so_far}"
    return seen


def submitted(out: Console, plan: Plan, made: Iterable[Written]) -> None:
    """Print the jobs that were submitted, or the scripts that were written."""
    listed = list(made)
    for one in listed:
        after = f", after {', '.join(one.after)}" if one.after else ""
        what = f"job {one.number}{after}" if one.number else f"{one.script}{after}"
        out.print(f"{one.stage:<14} {what}", highlight=False, soft_wrap=True)
    if not listed:
        undone = [planned.name for planned in plan.stages if not planned.artifact]
        out.print(f"nothing to submit: {', '.join(undone) + ' waits or runs' if undone else 'all is done'}")


def _status(plan: Plan, planned: Planned) -> tuple[str, str]:
    """The state of a stage and its last message."""
    if planned.artifact:
        return "done", f"{planned.artifact.name}, {units.duration(planned.artifact.manifest.seconds)}"
    work = plan.store.work_folders(plan.recipe.name, planned.name, planned.fingerprint)
    seen = events.read(work.events) if work.fingerprint == planned.fingerprint else []
    if not seen:
        return planned.state, "; ".join(planned.why)
    start = max((index for index, event in enumerate(seen) if event["event"] == "start"), default=0)
    first = next((event for event in seen[start:] if event["event"] == "progress"), None)
    is_held = lock.is_held(plan.store.lock_file(plan.recipe.name, planned.name))
    end, last = seen[-1], next((event for event in reversed(seen) if event["event"] != "ended"), seen[-1])
    if end["event"] == "ended" and end["cause"] in causes.FAILURES and last["event"] != "error" and not is_held:
        return "failed", f"{end['cause']}: {end['text']}"
    said = last.get("text") or (progress_line(last, first) if first and last["event"] == "progress" else "starts")
    if last["event"] == "error":
        return ("stopped" if last["exit_code"] == 130 else "failed"), said
    return ("running" if is_held else "stopped"), said


def lineage_tree(steps: Iterable[Step]) -> Tree:
    """A lineage as a tree."""
    branches: list[Tree] = []
    for step in steps:
        if step.artifact:
            one = step.artifact
            label = f"{one.name}  {one.manifest.uses}  {one.fingerprint[:12]}  {one.manifest.started[:10]}"
            label += "".join(f"\n  {line}" for line in lineage.licences(one))
        else:
            label = f"{step.name}  {step.problem or f'sha256 {step.sha256[:12]}'}"
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
    out.print(f"{made.name}: {held.claim}", highlight=False, soft_wrap=True)
    for check in held.checks:
        line = f"  {check.name}: {certificate.shown(check.value)} (limit {check.limit})"
        out.print(line, highlight=False, soft_wrap=True)


def verify(out: Console, chosen: Iterable[Artifact | Damaged]) -> bool:
    """Compare artifacts with their manifests and print what differs; returns whether all are whole."""
    all_whole = True
    for one in chosen:
        lines = [one.problem] if isinstance(one, Damaged) else list(artifact.verify(one))
        state = "damaged" if lines else "whole"
        all_whole = all_whole and not lines
        out.print(f"{state:<8} {one.name}", highlight=False, soft_wrap=True)
        for line in lines:
            out.print(f"         {line}", highlight=False, soft_wrap=True)
    return all_whole


def stages(out: Console, found: Iterable[tuple[str, str]]) -> None:
    """Print stages, each with the first line of its docstring."""
    for uses, said in found:
        out.print(f"{uses:<26} {said}", highlight=False, soft_wrap=True)


def keys(out: Console, listed: Iterable[Key]) -> None:
    """Print keys as a recipe spells them, with type, default and meaning."""
    for key in listed:
        out.print(Text(key.name, "bold") + f": {key.kind}", highlight=False, soft_wrap=True)
        indent = 4 * " "
        said = textwrap.fill(key.meaning, out.width, initial_indent=indent, subsequent_indent=indent)
        out.print(said, highlight=False)


def clean(out: Console, items: Iterable[Item]) -> None:
    """Print what can be deleted, and what is kept and why, with sizes."""
    table = Table("size", "", "path", "why", box=None, pad_edge=False)
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for item in items:
        sizes[item.is_kept].append(item.size_bytes)
        state = Text("kept", "green") if item.is_kept else Text("delete", "yellow")
        table.add_row(units.size(sizes[item.is_kept][-1]), state, Text(str(item.path), overflow="fold"), Text(item.why))
    if table.row_count:
        out.print(table)
    total = units.size(sum(sizes[False]))
    out.print(f"{len(sizes[False])} to delete, {total}; {len(sizes[True])} kept", highlight=False)


def reports(out: Console, made: Iterable[Artifact]) -> None:
    """Print the figures and the paths of the reports."""
    for item in made:
        if (item.path / "index.html").exists():
            for line in _figures(item.path / "report.json"):
                out.print(line, highlight=False, soft_wrap=True)
            out.print(f"report: {item.path / 'index.html'}", highlight=False, soft_wrap=True)


def _figures(file: Path) -> Iterator[str]:
    """Each task's figures in a line: of each checkpoint, with its standard error and what the change is worth."""
    told = files.read_json(file) if file.is_file() else {}
    for table in told.get("benchmarks", ()):
        if not table.get("is_main"):
            continue
        said = []
        for row in table["rows"]:
            value = units.score(row["value"], percent=table["percent"])
            error = row["standard_error"]
            around = "" if error is None else f" ± {units.error(error, percent=table['percent'])}"
            said.append(f"{row['model']} {value}{around}{_worth(row['change'], table['higher_is_better'])}")
        yield f"{table['task']}, {table['metric']}: {', '.join(said)}"


def _worth(change: Mapping[str, Any] | None, higher_is_better: bool) -> str:
    """What a change is worth, in brackets."""
    if not change or change["adjusted_p_value"] is None:
        return ""
    if not change["significant"]:
        return " (within error)"
    return " (gain)" if (change["value"] > 0) == higher_is_better else " (loss)"


def sweep(
    out: Console, keys: Sequence[str], variants: Sequence[Variant], found: tuple[list[str], list[list[float | None]]]
) -> None:
    """Print the figures of a recipe's variants, a row for each."""
    names, rows = found
    table = Table(box=None, pad_edge=False)
    for name in (*keys, *names):
        table.add_column(name, justify="right", overflow="fold")
    for variant, values in zip(variants, rows, strict=True):
        table.add_row(*variant.values, *("" if value is None else f"{value:.4g}" for value in values))
    out.print(table)


def facts(out: Console, found: Iterable[tuple[str, str]]) -> None:
    """Print what is told, a line each."""
    for name, told in found:
        out.print(f"{name:14} {told}", highlight=False, soft_wrap=True)


def to_chat_with(out: Console, made: Iterable[Artifact]) -> None:
    """Print how to talk to the last model that was made."""
    models = [one for one in made if any((one.path / name).exists() for name in ("config.json", "adapter_config.json"))]
    if models:
        out.print(f"chat: cordee chat {models[-1].name}", highlight=False, soft_wrap=True)
