"""Progress of a run: live bars in a terminal, plain lines in a log."""

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cordee import units
from cordee.shown import plain

LINE_EVERY_S = 15.0
WAITED_S = 1.0
"""What takes less is not said."""


def screen(*, stderr: bool = False) -> Console:
    """Where texts are shown as they are: no markup in them counts, and no sign in them steers the terminal."""
    console = Console(stderr=stderr, markup=False, emoji=False)
    console.push_render_hook(_Hook())
    return console


class _Hook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Plain(one) for one in renderables]


class _Plain:
    """What is shown, with texts that are plain."""

    def __init__(self, shown: RenderableType) -> None:
        self.shown = shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.shown, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self.shown)


@dataclass
class _Shown:
    """A stage that runs."""

    bar: TaskID | None = None
    at: float = 0.0
    """When a line about it was last printed."""
    first: dict[str, Any] | None = None
    """Its first progress."""
    waits: tuple[str, float] | None = None
    """What it waits for, and since when."""


class Display:
    """Shows the stages of one run, one after the other or several at once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self.bars = Progress(
            TextColumn("{task.description:<14}", style="bold", markup=False),
            BarColumn(24),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
        )
        self.stages: dict[str, _Shown] = {}

    def __enter__(self) -> "Display":
        """Start the live bars if there is a terminal."""
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the terminal."""
        if self.live:
            self.bars.stop()

    def begin(self, stage: str, text: str) -> None:
        """A stage starts."""
        now = time.monotonic()
        self.stages[stage] = _Shown(at=now, waits=("its first report", now))
        if self.live:
            self.stages[stage].bar = self.bars.add_task(stage, total=None, text=plain(text))
        else:
            self.say(stage, text)

    def event(self, stage: str, event: dict[str, Any]) -> None:
        """Show an event of a stage: progress or a note."""
        shown = self.stages[stage]
        if event["event"] in ("note", "resumed", "incident"):
            self.say(stage, event["text"])
        elif event["event"] == "waits":
            shown.waits = (event["text"], time.monotonic())
        elif event["event"] == "progress":
            shown.first, shown.waits = shown.first or event, None
            self._show(stage, progress_line(event, shown.first), event["done"], event["total"])

    def tick(self) -> None:
        """Time has passed: show what each stage waits for, and for how long by now."""
        for stage, shown in self.stages.items():
            if shown.waits:
                what, since = shown.waits
                if (waited := time.monotonic() - since) > WAITED_S:
                    self._show(stage, f"waits for {what}, {waited:.0f} s")

    def _show(self, stage: str, text: str, done: float | None = None, total: float | None = None) -> None:
        shown = self.stages[stage]
        if shown.bar is not None:
            self.bars.update(shown.bar, text=plain(text), completed=done, total=total)
        elif time.monotonic() - shown.at > LINE_EVERY_S:
            shown.at = time.monotonic()
            self.say(stage, text)

    def end(self, stage: str, text: str) -> None:
        """A stage is published, or ended without."""
        shown = self.stages.pop(stage)
        if shown.bar is not None:
            self.bars.update(shown.bar, completed=1, total=1, text=plain(text))
        else:
            self.say(stage, text)

    def say(self, stage: str, text: str) -> None:
        """Print one plain line about a stage."""
        self.console.print(f"{stage:<14} {text}", highlight=False, soft_wrap=True)


def progress_line(event: dict[str, Any], first: dict[str, Any]) -> str:
    """Progress of a stage: `steps 120/900  loss 3.210  7,812 tokens/s  1 min 23 s left`.

    The time left is estimated from the pace since `first`, the first progress event of this attempt.
    """
    done, total = event["done"], event["total"]
    parts = [f"{event['unit']} {done:,.0f}/{total:,.0f}"]
    for name, value in event["figures"].items():
        is_rate = name.endswith("_per_s")
        parts.append(f"{value:,.0f} {name.removesuffix('_per_s')}/s" if is_rate else f"{name} {value:.4g}")
    if first["done"] < done < total:
        pace_s = (event["time"] - first["time"]) / (done - first["done"])
        parts.append(f"{units.duration(pace_s * (total - done))} left")
    return "  ".join(parts)
