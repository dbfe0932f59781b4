"""Commands that use a model."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cordee.commands.common import RUNS, Runs, command, say
from cordee.shown import plain


@command
def chat_(  # noqa: PLR0913, PLR0917 - each is an option of the command
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a folder, or recipe/stage@version")],
    adapter: Annotated[str | None, typer.Option(help="an adapter on MODEL: a folder, or recipe/stage@version")] = None,
    system: Annotated[str, typer.Option(help="the system prompt")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy (default: the model's own)")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="(default: the model's own)")] = None,
    seed: Annotated[int, typer.Option(help="of what is sampled")] = 0,
    engine: Annotated[Literal["transformers", "vllm"], typer.Option(help="what computes the answers")] = "transformers",
    runs: Runs = RUNS,
) -> None:
    """Chat with a model or an adapter on the terminal; the end of the input ends it."""
    from cordee import lineage, model_folder
    from cordee.artifact import Store

    store = Store(runs)
    folder, on_top = lineage.place(model, store), lineage.place(adapter, store) if adapter else None
    if on_top:
        model_folder.require_adapter(on_top, folder, "--adapter")
    model_folder.require_served(folder, "MODEL")
    if sys.stderr.isatty():
        typer.echo(plain(f"opens {model} with {engine} …"), err=True)
    from cordee.compute import generators, talk, terminal
    from cordee.compute.adapter import placed_on

    place = placed_on(on_top, folder) if on_top else folder
    settings = generators.Settings(max_tokens, temperature, top_p, seed)
    opened = (generators.Vllm if engine == "vllm" else generators.Transformers)(place, settings)
    terminal.converse(talk.Chat(opened, system))


@command
def serve_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a folder, or recipe/stage@version")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="an adapter on MODEL, and its name; any number")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="on the loopback address")] = 8000,
    max_length: Annotated[int | None, typer.Option(min=16, help="longest request, in tokens")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="(default: the one that is stored)")
    ] = None,
    runs: Runs = RUNS,
) -> None:
    """Serve a model and adapters on it by vLLM's OpenAI-compatible server, on the loopback address."""
    from cordee import lineage
    from cordee.artifact import Store
    from cordee.errors import UserError

    store, adapters = Store(runs), []
    folder = lineage.place(model, store)
    for given in adapter or ():
        name, sign, place = given.partition("=")
        if not (name and sign and place):
            raise UserError(f"{given!r} names no adapter", key="--adapter", hint="write NAME=FOLDER")
        adapters.append((name, lineage.place(place, store)))
    name = folder.resolve().name if Path(model).exists() else model
    from cordee.compute import server

    server.run(name, folder, adapters, port=port, max_length=max_length, dtype=dtype, say=say)


@command
def export_(
    what: Annotated[str, typer.Argument(metavar="ARTIFACT", help="recipe/stage@version, a place in one, or a folder")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="the folder to write; its name is the model's")],
    licence: Annotated[
        str | None, typer.Option("--license", "--licence", help="of the model, as the hub spells it: apache-2.0")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="what the hub calls the model that this one was made from")
    ] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="add a file for llama.cpp, by its converter")] = False,
    runs: Runs = RUNS,
) -> None:
    """Write a model or an adapter as a folder for the hub: its files, and a model card filled from the manifests."""
    from cordee import lineage
    from cordee.artifact import Store
    from cordee.exporting import export

    store = Store(runs)
    card = export.run(lineage.place(what, store), out, store, licence, base_model, gguf=gguf)
    say(f"wrote {out}: {len(card.hashes)} files and a model card with {len(card.results)} figures")
    for line in card.lacks():
        say(f"the card lacks {line}")
