"""The command line. Each command imports what it needs when it runs; `data` alone imports torch."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cordee import __version__
from cordee.errors import CordeeError, from_system

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


def _command(function: Callable[..., None]) -> Callable[..., None]:
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


def _load(recipe_file: Path, overrides: list[str] | None, runs: Path) -> "Plan":
    from cordee import plan, recipe
    from cordee.artifact import Store

    return plan.make(recipe.load(recipe_file, overrides or []), Store(runs))


def _console() -> "Console":
    from rich.console import Console

    return Console()


@_command
def run(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    runs: Runs = RUNS,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="fail if a stage differs from its published artifact")
    ] = False,
) -> None:
    """Run the missing stages of a recipe and resume interrupted ones."""
    from cordee import runner, show

    plan, out = _load(recipe_file, overrides, runs), _console()
    show.plan(out, plan)
    if frozen:
        runner.require_frozen(plan)
    made = runner.run(plan, out).values()
    show.reports(out, made)
    show.to_chat_with(out, made)


@_command
def plan_(recipe_file: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS) -> None:
    """Show what `run` would do and what it would cost."""
    from cordee import show

    show.plan(_console(), _load(recipe_file, overrides, runs))


@_command
def status(recipe_file: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS) -> None:
    """Show the state of each stage of a recipe: done, running, stopped, failed, stale or ready."""
    from cordee import show

    show.status(_console(), _load(recipe_file, overrides, runs))


@_command
def stage_(recipe_file: RecipeFile, name: str, overrides: Overrides = None, runs: Runs = RUNS) -> None:
    """Run one stage of a recipe, for instance as a batch job; its inputs have to be published."""
    from cordee import runner, show

    plan, out = _load(recipe_file, overrides, runs), _console()
    plan.stage(name)
    show.reports(out, [runner.run(plan, out, only={name})[name]])


@_command
def report(recipe_file: RecipeFile, overrides: Overrides = None, runs: Runs = RUNS) -> None:
    """Run the report stages of a recipe, with the certificates published so far."""
    from cordee import runner, show

    plan, out = _load(recipe_file, overrides, runs), _console()
    names = plan.reports()
    artifacts = runner.run(plan, out, only=names)
    show.reports(out, [artifacts[name] for name in names])


@_command
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
    loaded, store, out = recipe.load(recipe_file, overrides), Store(runs), _console()
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


@_command
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
    if not show.verify(_console(), chosen):
        raise typer.Exit(1)


@_command
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
    show.clean(_console(), found)
    for item in found if yes else ():
        if not item.is_kept:
            clean.delete(item)


@_command
def lineage_(what: Annotated[str, typer.Argument(metavar="CHECKPOINT")], runs: Runs = RUNS) -> None:
    """Trace a checkpoint back to its source files and licences."""
    from cordee import lineage, show
    from cordee.artifact import Damaged, Store

    store = Store(runs)
    found = lineage.find(what, store)
    if isinstance(found, Damaged):
        raise found.fault()
    _console().print(show.lineage_tree(lineage.walk(found, store)))


@_command
def list_(uses: Annotated[str | None, typer.Argument(help="a package, or a stage as in `uses:`")] = None) -> None:
    """List the stages and proofs of the built-in packages or of another package, or the keys of one stage."""
    from cordee import keys, show, stage

    if found := list(stage.find(*([uses] if uses else []))):
        show.stages(_console(), found)
    elif uses:
        show.keys(_console(), keys.of(stage.load(uses, file="command line").config))


@_command
def data_(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="a data file, or a folder of them")],
    model: Annotated[Path, typer.Option(help="the model, or the adapter, that would be trained")],
    given: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="a source's keys, max_length, overlong, …")
    ] = None,
) -> None:
    """Show what a training would see of data: shape, lengths, trained tokens, and what would be left out."""
    from cordee import preview_keys

    settings = preview_keys.read(path, given or [])
    from cordee.compute import preview

    preview.run(settings, model, _console())


@_command
def doctor_(
    recipe_file: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="a recipe's YAML file, to see what it would lack here")
    ] = None,
    overrides: Overrides = None,
    runs: Runs = RUNS,
) -> None:
    """Show what this machine can do, and what is missing for a recipe."""
    from cordee import doctor, show

    out = _console()
    show.facts(out, doctor.machine_facts(runs))
    if recipe_file:
        show.facts(out, doctor.lacks(_load(recipe_file, overrides, runs)) or [("recipe", "nothing is missing")])


@_command
def init_(
    out: Annotated[Path, typer.Argument(metavar="[RECIPE]", help="the file to write")] = Path("recipe.yaml"),
    model: Annotated[Path | None, typer.Option(help="a model's folder, or an adapter's")] = None,
    chats: Annotated[Path | None, typer.Option(help="chats or texts to train on")] = None,
    pairs: Annotated[Path | None, typer.Option(help="preference pairs to train on")] = None,
    corpus: Annotated[Path | None, typer.Option(help="texts to train a model of one's own on")] = None,
    questions: Annotated[Path | None, typer.Option(help="questions with answers to measure on")] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval's tasks to measure on, with commas between")] = "",
    data_dir: Annotated[Path | None, typer.Option(help="a folder with the hub's data sets for the tasks")] = None,
) -> None:
    """Write a recipe for what you have: a model, and chats, pairs, a corpus, questions or tasks."""
    from cordee import init, recipe

    has = init.Has(model, chats, pairs, corpus, questions, tuple(filter(None, tasks.split(","))), data_dir)
    init.write(init.ask(typer.prompt) if has == init.Has() and sys.stdin.isatty() else has, out)
    recipe.load(out, [])
    typer.echo(f"wrote {out}: look at it, then\n  cordee plan {out}\n  cordee run {out}")


@_command
def chat_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a folder, or recipe/stage@version")],
    adapter: Annotated[Path | None, typer.Option(help="an adapter on MODEL")] = None,
    system: Annotated[str, typer.Option(help="the system prompt")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy (default: the model's own)")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="(default: the model's own)")] = None,
    seed: Annotated[int, typer.Option(help="of what is sampled")] = 0,
    runs: Runs = RUNS,
) -> None:
    """Chat with a model or an adapter on the terminal; the end of the input ends it."""
    from cordee import lineage, model_folder
    from cordee.artifact import Store

    folder = lineage.place(model, Store(runs))
    base = folder if adapter else None
    if adapter:
        model_folder.require_adapter(adapter, folder, "--adapter")
    model_folder.require_served(folder, "MODEL")
    from cordee.compute import talk

    settings = talk.Settings(max_tokens, temperature, top_p, seed)
    talk.on_terminal(talk.Chat(adapter or folder, settings, base, system))


def main() -> None:
    """The entry point."""
    app()
