"""Writes a line into a file, and can be told to fail in each of the ways in which stages fail."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from cordee import worker
from cordee.config import Config as Base
from cordee.config import Execution, Input
from cordee.cost import Cost
from cordee.errors import Fault, UserError
from cordee.stage import Context

ERRORS = {
    "user": UserError("is dry", file="spring.txt", key="text", hint="did you mean 'wine'?"),
    "key": UserError("1 litre can't be divided by 0 buckets", key="number"),
    "fault": Fault("the pipe burst", file="pipe"),
}


class Config(Base):
    """What the spring is told."""

    text: str = "water"
    """The line."""
    source: Input | None = None
    """A file or folder to read."""
    number: float = Field(default=1.0, gt=0)
    """A number."""
    trouble: Execution[str] = ""
    """How to fail: user, key, fault, crash, kill, wait, full, meet (wait for another); an execution key, so that a
    fixed run goes on."""


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """A spring costs a FLOP for each letter."""
    return Cost(tokens=float(len(config.text)), rows=given["source"].rows if "source" in given else None)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write the line."""
    (context.out / "first.txt").write_text(config.text)
    context.log(1, loss=2.0)
    while config.trouble == "meet" and len(list(context.out.parent.glob("*/first.txt"))) < 2:
        time.sleep(0.05)
    if config.trouble in ERRORS:
        raise ERRORS[config.trouble]
    if config.trouble == "crash":
        raise ZeroDivisionError("by nothing")
    if config.trouble == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.trouble == "full":
        Path("/dev/full").write_text("x" * 100_000)
    if config.trouble == "wait":
        for step in range(600):
            context.progress(step, 600, "step", loss=1.0)
            context.stop_if_asked(f"step {step} of 600")
            time.sleep(0.1)
    read = config.source.read_text() if config.source and config.source.is_file() else ""
    (context.out / "line.txt").write_text(read + config.text + "\n")
    return {"rows": 1, "tokens": len(config.text)}


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
