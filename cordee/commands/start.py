"""Commands for the first minute: what data hold, what this machine can do, a first recipe."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cordee.commands.common import RUNS, Overrides, Runs, command, console, load, say


@command
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

    preview.run(settings, model, console())


@command
def doctor_(
    recipe_file: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="a recipe's YAML file, to see what it would lack here")
    ] = None,
    overrides: Overrides = None,
    runs: Runs = RUNS,
) -> None:
    """Show what this machine can do, and what is missing for a recipe."""
    from cordee import doctor, show

    out = console()
    show.facts(out, doctor.machine_facts(runs))
    if recipe_file:
        show.facts(out, doctor.lacks(load(recipe_file, overrides, runs)) or [("recipe", "nothing is missing")])


@command
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
    from cordee.errors import CordeeError

    names = tuple(filter(None, tasks.replace(" ", "").split(",")))
    has = init.Has(model, chats, pairs, corpus, questions, names, data_dir)
    made = init.write(init.ask(typer.prompt) if has == init.Has() and sys.stdin.isatty() else has, out)
    try:
        recipe.load(out, [])
    except CordeeError:
        for path in made:
            path.unlink()
        raise
    say(f"wrote {out}: look at it, then\n  cordee plan {out}\n  cordee run {out}")


@command
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="a YAML file of axolotl, LLaMA-Factory, TRL, alignment-handbook, torchtune"
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="[RECIPE]", help="the file to write")] = Path("recipe.yaml"),
    processes: Annotated[int, typer.Option(min=1, help="processes that the training was started with")] = 1,
) -> None:
    """Write a recipe from another trainer's configuration, and tell what became of each of its keys."""
    from cordee.importing import peers, writing

    draft = peers.read(file, processes)
    writing.write(draft, out)
    say("\n".join(writing.told(draft)))
    say(f"wrote {out}: look at it, then\n  cordee plan {out}\n  cordee run {out}")
