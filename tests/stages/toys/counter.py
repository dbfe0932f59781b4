"""Counts as a training does: asked to stop, it saves its state, and continues from there to the same end."""

import hashlib
import time
from typing import Any

from cordee import files, worker
from cordee.config import Config as Base
from cordee.config import Execution, Input
from cordee.stage import Context


class Config(Base):
    """What is counted."""

    to: int = 40
    """The last number."""
    pace_s: Execution[float] = 0.0
    """Seconds for each number."""
    after: Input | None = None
    """What has to be there before."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Count, and keep a digest of all numbers."""
    file = context.out / "state.json"
    state = files.read_json(file) if file.exists() else {"step": 0, "digest": ""}
    if state["step"]:
        context.resumed(state["step"])
    while state["step"] < config.to:
        if context.stop_requested():
            files.write_json(file, state)
            context.stop(f"step {state['step']} of {config.to}")
        time.sleep(config.pace_s)
        step = state["step"] + 1
        state = {"step": step, "digest": hashlib.sha256(f"{state['digest']} {step}".encode()).hexdigest()}
        context.progress(step, config.to, "steps")
        if step % 10 == 0:
            files.write_json(file, state)
    file.unlink(missing_ok=True)
    (context.out / "digest.txt").write_text(state["digest"])
    return {"counted": config.to}


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
