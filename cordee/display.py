"""What a person sees while a recipe runs: live bars on a terminal, plain lines in a log."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

LINE_EVERY_S = 15.0


class Display:
    """Shows the stages of one run, one after the other."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self.bars = Progress(
            TextColumn("[bold]{task.description:<14}"),
            BarColumn(24),
            TextColumn("{task.fields[said]}"),
            console=console,
        )
        self.bar: TaskID | None = None
        self.stage = ""
        self.said_at = 0.0
        self.first: dict[str, Any] | None = None

    def __enter__(self) -> "Display":
        """Start the live bars where there is a terminal."""
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was."""
        if self.live:
            self.bars.stop()

    def begin(self, stage: str, said: str) -> None:
        """A stage starts."""
        self.stage, self.said_at, self.first = stage, time.monotonic(), None
        if self.live:
            self.bar = self.bars.add_task(stage, total=None, said=said)
        else:
            self.say(said)

    def event(self, event: dict[str, Any]) -> None:
        """A stage says how far it is, or a note that a person should read."""
        if event["event"] == "note":
            self.say(event["text"])
        elif event["event"] == "progress":
            self.first = self.first or event
            said = progress_line(event, self.first)
            if self.live and self.bar is not None:
                self.bars.update(self.bar, completed=event["done"], total=event["total"], said=said)
            elif not self.live and time.monotonic() - self.said_at > LINE_EVERY_S:
                self.said_at = time.monotonic()
                self.say(said)

    def end(self, said: str) -> None:
        """The stage is published."""
        if self.live and self.bar is not None:
            self.bars.update(self.bar, completed=1, total=1, said=said)
        else:
            self.say(said)

    def say(self, text: str) -> None:
        """Print one plain line."""
        self.console.print(f"{self.stage:<14} {text}", markup=False, highlight=False, soft_wrap=True)


def progress_line(event: dict[str, Any], first: dict[str, Any]) -> str:
    """Where a stage is: `steps 120/900  loss 3.210  7,812 tokens/s  1:23 left`.

    What is left is told from the pace since `first`, the first thing that this attempt said.
    """
    done, total = event["done"], event["total"]
    parts = [f"{event['unit']} {done:,.0f}/{total:,.0f}"]
    for name, value in event["figures"].items():
        is_rate = name.endswith("_per_s")
        parts.append(f"{value:,.0f} {name.removesuffix('_per_s')}/s" if is_rate else f"{name} {value:.4g}")
    if first["done"] < done < total:
        pace_s = (event["time"] - first["time"]) / (done - first["done"])
        parts.append(f"{duration(pace_s * (total - done))} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a person reads them: `0.4 s`, `12 s`, `3:05`, `2:10:00`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
