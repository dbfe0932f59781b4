"""Commands that use a model."""

from pathlib import Path
from typing import Annotated

import typer

from cordee.commands.common import RUNS, Runs, command


@command
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
