"""The command line. It answers at once: nothing here imports torch, and stages import it only when they run."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cordee import artifact, lineage, plan, prove, recipe, runner, show, stage
from cordee.artifact import Store
from cordee.display import Display
from cordee.errors import CordeeError, UserError

app = typer.Typer(
    help="From an open corpus to an aligned, evaluated language model: one file, one command, and the proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console()

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe's YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[stage.key=value]...", help="what to change in it")]
Runs = Annotated[Path, typer.Option(help="the folder that holds the artifacts")]
RUNS = Path("runs")


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command whose errors are one line and an exit code."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except CordeeError as error:
            sys.stderr.write(f"cordee: {error}\n")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            sys.stderr.write("cordee: interrupted\n")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise typer.Exit(1) from None

    app.command(name=function.__name__.rstrip("_"))(call)
    return call


def _load(recipe_file: Path, overrides: list[str] | None, runs: Path) -> plan.Plan:
    return plan.make(recipe.load(recipe_file, overrides or []), Store(runs))


@_command
def run(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    runs: Runs = RUNS,
    frozen: Annotated[bool, typer.Option("--frozen", help="fail if anything would be made anew")] = False,
) -> None:
    """Make every stage of a recipe that is not done yet."""
    made = _load(recipe_file, overrides, runs)
    out.print(show.plan_table(made))
    if frozen:
        runner.require_frozen(made)
    with Display(out) as display:
        artifacts = runner.run(made, display)
    show.reports(out, artifacts.values())


@_command
def plan_(recipe_file: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS) -> None:
    """Show what `run` would do and what it would cost; start nothing."""
    made = _load(recipe_file, overrides, runs)
    out.print(show.plan_table(made))
    for line in show.plan_notes(made):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


@_command
def status(recipe_file: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS) -> None:
    """Show how far each stage of a recipe is: done, running, stopped or failed."""
    out.print(show.status_table(_load(recipe_file, overrides, runs)))


@_command
def stage_(recipe_file: RecipeFile, name: str, overrides: Overrides = None, runs: Runs = RUNS) -> None:
    """Make one stage of a recipe, as a job of a batch system does; its inputs have to be done."""
    made = _load(recipe_file, overrides, runs)
    made.stage(name)
    with Display(out) as display:
        artifacts = runner.run(made, display, only={name})
    show.reports(out, [artifacts[name]])


@_command
def report(recipe_file: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS) -> None:
    """Make a recipe's report from the artifacts and certificates that are there."""
    made = _load(recipe_file, overrides, runs)
    names = {planned.name for planned in made.stages if planned.item.stage.uses == "eval.report"}
    if not names:
        raise UserError("has no stage that uses eval.report", file=recipe_file, key="stages")
    with Display(out) as display:
        artifacts = runner.run(made, display, only=names)
    show.reports(out, [artifacts[name] for name in names])


@_command
def prove_(
    recipe_file: RecipeFile,
    proofs: Annotated[list[str] | None, typer.Argument(help="which ones (all); stage.key=value changes a key")] = None,
    runs: Runs = RUNS,
) -> None:
    """Prove a claim on your own recipe and machine; each certificate is an artifact and stands in the report."""
    names = [word for word in proofs or [] if "=" not in word] or sorted(prove.find())
    overrides = [word for word in proofs or [] if "=" in word]
    loaded, store = recipe.load(recipe_file, overrides), Store(runs)
    for name in names:
        for made, proven in prove.plans(loaded, store, name):
            with Display(out) as display:
                certificate = runner.run(made, display, proves=proven)[made.stages[-1].name]
            show.certificate(out, certificate)
    made = plan.make(loaded, store)
    waiting = {planned.name for planned in made.stages if planned.state != "done"}
    if waiting and all(made.stage(name).item.stage.uses == "eval.report" for name in waiting):
        with Display(out) as display:
            show.reports(out, runner.run(made, display).values())


@_command
def verify(
    what: Annotated[list[str] | None, typer.Argument(help="recipe/stage@version, or a path (all)")] = None,
    runs: Runs = RUNS,
) -> None:
    """Hash artifacts again and say what differs from their manifests."""
    store = Store(runs)
    chosen = [lineage.find(name, store) for name in what] if what else store.everything("")
    damaged = 0
    for item in chosen:
        lines = list(artifact.verify(item))
        damaged += bool(lines)
        out.print(f"{'damaged' if lines else 'whole':<8} {item.name}", highlight=False)
        for line in lines:
            out.print(f"         {line}", markup=False, highlight=False, soft_wrap=True)
    if damaged:
        raise typer.Exit(1)


@_command
def lineage_(what: Annotated[str, typer.Argument(metavar="CHECKPOINT")], runs: Runs = RUNS) -> None:
    """Walk from a checkpoint back to its source files and licences."""
    store = Store(runs)
    out.print(show.lineage_tree(lineage.walk(lineage.find(what, store), store)))


@_command
def list_() -> None:
    """List the stages and proofs that recipes can use, read from the source."""
    for uses, said in stage.find():
        out.print(f"{uses:<26} {said}", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """The entry point."""
    app()
