"""Commands that plan and run a recipe, here or on a cluster, and tell how far it is."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cordee.commands.common import RUNS, Overrides, RecipeFile, command, console, load, say

if TYPE_CHECKING:
    from cordee.cluster import Cluster
    from cordee.plan import Plan

Restarts = Annotated[
    int, typer.Option(min=0, help="restarts of a stage that was killed or hangs, before it is a step further (0: none)")
]
OnCluster = Annotated[
    str | None, typer.Option("--cluster", metavar="NAME", help="configs/clusters/NAME.yaml, or a path to such a file")
]
RunsOr = Annotated[
    Path | None, typer.Option("--runs", help="the folder that holds the artifacts (default: the cluster's, or runs)")
]


def _cluster(runs: Path | None, name: str | None) -> "tuple[Cluster, Path]":
    """A cluster and the folder of its artifacts; its variables are set: they decide what `auto` is in a recipe."""
    from cordee import cluster

    on = cluster.load(name) if name else cluster.HERE
    os.environ.update(on.variables())
    return on, runs or (cluster.expanded(on.runs) if on.runs else RUNS)


def _load(
    recipe_file: Path, overrides: list[str] | None, runs: Path | None, name: str | None
) -> "tuple[Plan, Cluster]":
    """The plan of a recipe on a cluster, and the cluster."""
    on, root = _cluster(runs, name)
    return load(recipe_file, overrides, root), on


@command
def run(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    runs: RunsOr = None,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="fail if a stage differs from its published artifact")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="stages that may run at once on this machine")] = 1,
    restarts: Restarts = 3,
    on: OnCluster = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="write the job scripts, and submit nothing")] = False,
) -> None:
    """Run the missing stages of a recipe and resume interrupted ones; on a Slurm cluster, submit them as jobs."""
    from cordee import runner, show
    from cordee.errors import UserError

    (plan, where), out = _load(recipe_file, overrides, runs, on), console()
    show.plan(out, plan)
    if frozen:
        runner.require_frozen(plan)
    if where.kind == "slurm":
        from cordee import batch

        if jobs > 1:
            raise UserError("is for one machine; Slurm decides how many jobs run at once", key="--jobs")
        show.submitted(out, plan, batch.submit(plan, where, restarts=restarts, dry_run=dry_run))
        return
    if dry_run:
        raise UserError("is for Slurm clusters", key="--dry-run", hint="`cordee plan` shows what a run would do")
    made = runner.run(plan, out, where=runner.Where(where, jobs=jobs, restarts=restarts)).values()
    show.reports(out, made)
    show.to_chat_with(out, made)


@command
def sweep_(
    recipe_file: RecipeFile,
    over: Annotated[
        list[str], typer.Option("--over", metavar="stage.key=value,value", help="a key and its values; may be repeated")
    ],
    overrides: Overrides = None,
    in_step: Annotated[
        bool, typer.Option("--in-step", help="the first values together, then the second ones, instead of a grid")
    ] = False,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", metavar="stage.metric", help="what to show; may be repeated")
    ] = None,
    runs: RunsOr = None,
    on: OnCluster = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the variants, and run nothing")] = False,
) -> None:
    """Run a recipe with several values of some keys, and show what came of each; on Slurm, submit them all."""
    from cordee import batch, runner, show, sweep
    from cordee.artifact import Store
    from cordee.errors import CordeeError, Fault, Stopped

    where, root = _cluster(runs, on)
    out, store = console(), Store(root)
    variants = sweep.variants(recipe_file, overrides or [], over, in_step=in_step)
    keys, failed = [one.partition("=")[0] for one in over], []
    for number, variant in enumerate(variants, 1):
        said = ", ".join(f"{key}={value}" for key, value in zip(keys, variant.values, strict=True))
        out.print(f"variant {number} of {len(variants)}: {said}", highlight=False, soft_wrap=True)
        if where.kind == "slurm":
            plan = variant.plan(store)
            show.submitted(out, plan, batch.submit(plan, where, dry_run=dry_run))
        elif not dry_run:
            try:
                runner.run(variant.plan(store), out, where=runner.Where(where))
            except Stopped:
                raise
            except CordeeError as error:  # the other variants may be right
                failed.append(f"variant {number}: {error}")
    if not dry_run:
        show.sweep(out, keys, variants, sweep.results([one.plan(store) for one in variants], metric or []))
    if failed:
        raise Fault(f"{len(failed)} of {len(variants)} variants failed: {'; '.join(failed)}", file=recipe_file)


@command
def plan_(recipe_file: RecipeFile, overrides: Overrides = None, runs: RunsOr = None, on: OnCluster = None) -> None:
    """Show what `run` would do and what it would cost."""
    from cordee import show

    show.plan(console(), _load(recipe_file, overrides, runs, on)[0])


@command
def stage_(
    recipe_file: RecipeFile,
    name: str,
    overrides: Overrides = None,
    runs: RunsOr = None,
    on: OnCluster = None,
    restarts: Restarts = 3,
) -> None:
    """Run one stage of a recipe, as a batch job does; its inputs have to be published."""
    from cordee import launchers, runner, show, stage
    from cordee.errors import Fault, Stopped

    (plan, cluster), out = _load(recipe_file, overrides, runs, on), console()
    plan.stage(name)
    where = runner.Where(cluster, restarts=restarts)
    try:
        show.reports(out, [runner.run(plan, out, only={name}, where=where)[name]])
    except Stopped as error:
        if not stage.is_due():
            raise
        if stage.BEGINS_AGAIN in error.problem:
            hint = "give it more: resources.time, or the cluster file's time_limit"
            problem = f"its time is over, and it keeps no state to continue from ({error})"
            raise Fault(problem, file=plan.recipe.file, key=f"stages.{name}", hint=hint) from error
        sys.stderr.write(f"cordee: {error}\n")
        raise typer.Exit(launchers.REQUEUE) from error


@command
def status(recipe_file: RecipeFile, overrides: Overrides = None, runs: RunsOr = None, on: OnCluster = None) -> None:
    """Show the state of each stage of a recipe: done, running, waiting, stopped, failed, stale or ready."""
    from cordee import jobs, show
    from cordee.errors import CordeeError

    plan, out = _load(recipe_file, overrides, runs, on)[0], console()
    numbers, queue, lacks = jobs.submitted(plan), {}, ""
    if numbers:
        try:
            queue = jobs.queued()
        except CordeeError as error:  # the artifacts and events still say how far it is
            lacks = f"nothing is known of its jobs: {error}"
    show.status(out, plan, None if lacks else (numbers, queue))
    if lacks:
        out.print(lacks, highlight=False, soft_wrap=True)


@command
def logs(
    recipe_file: RecipeFile,
    name: Annotated[str | None, typer.Argument(metavar="STAGE")] = None,
    overrides: Overrides = None,
    runs: RunsOr = None,
    on: OnCluster = None,
    lines: Annotated[int, typer.Option(min=1, help="how many of the last ones of each file")] = 40,
) -> None:
    """Show what a stage has told and the end of its processes' output, and of its last job's."""
    from cordee import events, jobs
    from cordee.errors import UserError
    from cordee.work import Work

    plan = _load(recipe_file, overrides, runs, on)[0]
    if name is None:
        hint = f"one of {', '.join(planned.name for planned in plan.stages)}"
        raise UserError("names no stage", file="command line", key="STAGE", hint=hint)
    planned = plan.stage(name)
    made = planned.artifact
    if made:
        work = Work(made.path, made.path.parent / "logs" / made.path.name)
    else:
        work = plan.store.work_folders(plan.recipe.name, name, planned.fingerprint)
    found = [path for path in (jobs.output(plan, name), work.events, work.log) if path and path.exists()]
    if not found:
        raise UserError("was not started yet", file=plan.recipe.file, key=f"stages.{name}")
    for path in found:
        said = (
            events.lines(path)
            if path == work.events
            else path.read_text(encoding="utf-8", errors="replace").splitlines()
        )
        say(f"==> {path}")
        for line in said[-lines:]:
            say(line)


@command
def cancel(
    recipe_file: RecipeFile,
    name: Annotated[str | None, typer.Argument(metavar="[STAGE]")] = None,
    runs: RunsOr = None,
    on: OnCluster = None,
) -> None:
    """Cancel the Slurm jobs of a recipe or of one stage; they save first, and the next run continues from there."""
    from cordee import jobs

    overrides = [name] if name and "=" in name else None
    plan = _load(recipe_file, overrides, runs, on)[0]
    ended = jobs.cancel(plan, None if overrides else name)
    for stage, number in ended.items():
        typer.echo(f"{stage:<14} job {number} is cancelled")
    if not ended:
        typer.echo("no job waits or runs")
