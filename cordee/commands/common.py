"""What all commands share: errors in one line, and the arguments that most of them take."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cordee import __version__
from cordee.errors import CordeeError, from_system
from cordee.shown import plain

if TYPE_CHECKING:
    from rich.console import Console

    from cordee.plan import Plan

app = typer.Typer(
    help="Train and evaluate language models from one recipe: pretraining, SFT, DPO, generation, benchmarks, report.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe's YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[stage.key=value]...", help="keys to override")]
Runs = Annotated[Path, typer.Option(help="the folder that holds the artifacts")]
RUNS = Path("runs")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"cordee {__version__}")
        raise typer.Exit


FIRST = """\
cordee init     writes a recipe for what you have: a model, and chats, pairs, a corpus, questions or tasks
cordee run      runs a recipe; cordee plan shows what that will do, cordee doctor what this machine can do
cordee --help   lists all commands"""


@app.callback()
def _options(
    context: typer.Context,
    _asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(FIRST)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a function as a command that reports errors in one line and by exit code."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except CordeeError as error:
            sys.stderr.write(f"cordee: {error}\n")
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            sys.stderr.write(f"cordee: {from_system(error)}\n")
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            sys.stderr.write("cordee: interrupted\n")
            raise typer.Exit(130) from None

    app.command(name=function.__name__.rstrip("_"))(call)
    return call


def load(recipe_file: Path, overrides: list[str] | None, runs: Path) -> "Plan":
    """The plan of a recipe file with overrides."""
    from cordee import plan, recipe
    from cordee.artifact import Store

    return plan.make(recipe.load(recipe_file, overrides or []), Store(runs))


def console() -> "Console":
    """Standard output, as wide as the terminal."""
    from cordee.display import screen

    return screen()


def say(text: str) -> None:
    """Print a line."""
    typer.echo(plain(text))
