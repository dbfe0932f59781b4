"""Commands about what a recipe reads, and what came of it."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cordee.commands.common import RUNS, Overrides, RecipeFile, Runs, command, console, load, say


@command
def fetch_(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    to: Annotated[
        Path | None, typer.Option(help="the folder to fetch to (default: as before, or the cache of huggingface_hub)")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="take the newest commits, not those of the lock")] = False,
    runs: Runs = RUNS,
) -> None:
    """Fetch the models and data sets that a recipe refers to on the hub, and lock their commits and hashes."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # huggingface_hub reads them when it is imported
        os.environ.pop(name, None)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from cordee import fetch, hashes, recipe
    from cordee.artifact import Store

    loaded, kept = recipe.load(recipe_file, overrides or []), hashes.Kept(Store(runs).hashes)
    failed = fetch.run(loaded, to, kept.of, say, update=update)
    kept.save()
    for error in failed:
        sys.stderr.write(f"cordee: {error}\n")
    if failed:
        raise typer.Exit(failed[0].exit_code)


@command
def report(recipe_file: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS) -> None:
    """Run the report stages of a recipe, with the certificates published so far."""
    from cordee import runner, show

    plan, out = load(recipe_file, overrides, runs), console()
    names = plan.reports()
    artifacts = runner.run(plan, out, only=names)
    show.reports(out, [artifacts[name] for name in names])


@command
def prove_(
    recipe_file: RecipeFile,
    proofs: Annotated[
        list[str] | None, typer.Argument(help="proofs to run (default: all that apply), and stage.key=value")
    ] = None,
    runs: Runs = RUNS,
) -> None:
    """Run proofs on a recipe and this machine; each publishes a certificate, which the report shows."""
    from cordee import plan, prove, recipe, runner, show
    from cordee.artifact import Store

    names = [word for word in proofs or [] if "=" not in word]
    overrides = [word for word in proofs or [] if "=" in word]
    loaded, store, out = recipe.load(recipe_file, overrides), Store(runs), console()
    if not names:
        apply, others = prove.sort(loaded)
        names = [proof.name for proof in apply]
        show.left_out(out, others)
    for name in names:
        for with_proof, proven in prove.plans(loaded, store, name):
            show.proof(out, runner.run(with_proof, out, proves=proven)[with_proof.stages[-1].name])
    now = plan.make(loaded, store)
    if {planned.item.stage.uses for planned in now.stages if planned.state != "done"} == {plan.REPORT}:
        show.reports(out, runner.run(now, out).values())


@command
def verify(
    what: Annotated[
        list[str] | None, typer.Argument(help="recipe/stage@version, or a path (default: all artifacts)")
    ] = None,
    runs: Runs = RUNS,
) -> None:
    """Compare the files of artifacts with the hashes in their manifests."""
    from cordee import lineage, show
    from cordee.artifact import Store

    store = Store(runs)
    chosen = [lineage.find(name, store) for name in what] if what else store.scan()
    if not show.verify(console(), chosen):
        raise typer.Exit(1)


@command
def clean_(
    recipe_file: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="a recipe's YAML file (default: all that were run)")
    ] = None,
    overrides: Overrides = None,
    runs: Runs = RUNS,
    yes: Annotated[bool, typer.Option("--yes", help="delete it")] = False,
) -> None:
    """List what no run will use again, such as attempts that no plan continues; delete it with --yes."""
    from cordee import clean, recipe, show
    from cordee.artifact import Store

    found = clean.find(Store(runs), recipe.load(recipe_file, overrides or []) if recipe_file else None)
    show.clean(console(), found)
    for item in found if yes else ():
        if not item.is_kept:
            clean.delete(item)


@command
def lineage_(what: Annotated[str, typer.Argument(metavar="CHECKPOINT")], runs: Runs = RUNS) -> None:
    """Trace a checkpoint back to its source files and licences."""
    from cordee import lineage, show
    from cordee.artifact import Damaged, Store

    store = Store(runs)
    found = lineage.find(what, store)
    if isinstance(found, Damaged):
        raise found.fault()
    console().print(show.lineage_tree(lineage.walk(found, store)))


@command
def list_(uses: Annotated[str | None, typer.Argument(help="a package, or a stage as in `uses:`")] = None) -> None:
    """List the stages and proofs of the built-in packages or of another package, or the keys of one stage."""
    from cordee import keys, show, stage

    if found := list(stage.find(*([uses] if uses else []))):
        show.stages(console(), found)
    elif uses:
        show.keys(console(), keys.of(stage.load(uses, file="command line").config))
