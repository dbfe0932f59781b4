"""Started as a training is, by `accelerate launch`: every process leaves its number in a file; nothing is trained."""

import os
import signal
import time
from typing import Any

from cordee import worker
from cordee.config import AccelerateConfig, Execution
from cordee.stage import Context


class Config(AccelerateConfig):
    """What the choir is told."""

    song: str = "la"
    """What it sings."""
    trouble: Execution[str] = ""
    """How to fail: kill, wait."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Wait until every process was heard."""
    if config.trouble == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    voices, count = context.out / "voices", int(os.environ.get("WORLD_SIZE", "1"))
    voices.mkdir(exist_ok=True)
    (voices / os.environ.get("RANK", "0")).write_text(str(os.getpid()))
    nodes = context.out / "nodes"
    nodes.mkdir(exist_ok=True)
    (nodes / os.environ.get("RANK", "0")).write_text(os.environ.get("SLURMD_NODENAME", ""))
    while context.is_main and len(list(voices.iterdir())) < count:
        time.sleep(0.05)
    for step in range(600 if config.trouble == "wait" else 0):
        context.progress(step, 600, "step")
        time.sleep(0.1)
    return {}


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
