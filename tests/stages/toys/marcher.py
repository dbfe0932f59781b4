"""Takes steps as a training does, with heartbeats and resume points, and can be told to fail in many ways at a step."""

import ctypes
import hashlib
import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

from cordee import files, worker
from cordee.config import AccelerateConfig, Execution
from cordee.errors import Fault
from cordee.stage import Context

ERRORS = {
    "reset": ConnectionResetError(104, "Connection reset by peer"),
    "io": OSError(5, "Input/output error"),
}


class Config(AccelerateConfig):
    """How far it goes."""

    to: int = 60
    """The last step."""
    pace_s: Execution[float] = 0.02
    """Seconds of a step."""
    trouble: Execution[str] = ""
    """How it fails: kill, term, stop, gil, segv, nan, oom, full, reset, io, leak, deaf, compute."""
    at: Execution[int] = 35
    """The step in which it does."""
    times: Execution[int] = 1
    """How often."""
    slow_s: Execution[float] = 0.0
    """Seconds more that the process of rank 1 takes for a step."""


def compute(_context: Context, _step: int) -> None:
    end = time.process_time() + 1.5
    while time.process_time() < end:
        pass


def diverge(context: Context, step: int) -> None:
    raise Fault(f"step {step}: the loss is nan and the gradient's norm nan", file=context.out)


def ask_too_much(_context: Context, _step: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    bytearray(2**31)


def leak(_context: Context, _step: int) -> None:
    held = []
    while True:
        held.append(os.urandom(2**20) * 8)


WAYS: dict[str, Callable[[Context, int], Any]] = {
    "compute": compute,
    "deaf": lambda _context, _step: time.sleep(60),
    "full": lambda context, _step: (context.out / "large.bin").write_bytes(bytes(2**26)),
    "gil": lambda _context, _step: ctypes.PyDLL(None).sleep(3600),  # a call that does not let go of the GIL
    "leak": leak,
    "nan": diverge,
    "oom": ask_too_much,
}


def fail(trouble: str, context: Context, step: int) -> None:
    """Fail in one of the ways."""
    if trouble in ERRORS:
        raise ERRORS[trouble]
    if trouble in WAYS:
        WAYS[trouble](context, step)
    else:
        os.kill(os.getpid(), getattr(signal, f"SIG{trouble.upper()}"))


def run(config: Config, context: Context) -> dict[str, Any]:
    """Step, and keep a digest of all steps."""
    heart, file, failed = context.heart, context.out / "state.json", context.events.with_name("failed")
    state = files.read_json(file) if file.exists() else {"step": 0, "digest": ""}
    if state["step"]:
        context.resumed(state["step"])
    while state["step"] < config.to:
        step = state["step"] + 1
        heart.begin("data", state["step"])
        heart.enter("step")
        time.sleep(config.pace_s + (0.0 if context.is_main else config.slow_s))
        heart.alone()
        count = int(failed.read_text()) if failed.exists() else 0
        if step == config.at and config.trouble and count < config.times:
            failed.write_text(str(count + 1))
            fail(config.trouble, context, step)
        state = {"step": step, "digest": hashlib.sha256(f"{state['digest']} {step}".encode()).hexdigest()}
        heart.stepped(step)
        context.progress(step, config.to, "steps")
        asked = context.save_requested()
        if step % 10 == 0 or asked or context.stop_requested():
            heart.enter("checkpoint")
            if context.is_main:
                files.write_json(file, state)
            if asked:
                context.note(f"saved at step {step}")
                context.drop_save_request()
        if context.stop_requested():
            context.stop(f"step {step} of {config.to}")
    heart.enter("publish")
    if context.is_main:
        file.unlink()
        (context.out / "digest.txt").write_text(state["digest"])
    return {"steps": config.to}


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
