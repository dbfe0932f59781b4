"""Runs programs that models wrote, each in a process of its own, without network, files to write or other processes."""

import functools
import math
import os
import secrets
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, cast

from cordee.errors import Fault

MEMORY = 4 << 30
"""Bytes of address space that a program may use, as in EvalPlus."""
STARTED_WITHIN = 60
"""Seconds in which Python starts, even from a slow disk."""
READY = (b"ready 0\n", b"ready 1\n")
"""What is said before a program is run: that files can be read, and that they can't."""
SCRIPT = Path(__file__).with_name("sandboxed.py")
PROBE = """
import os, socket
for refused in (socket.socket, os.fork, lambda: os.kill(os.getpid(), 0), lambda: open("written", "w")):
    try:
        refused()
    except OSError:
        continue
    raise SystemExit
"""
"""Ends by itself only where nothing of this is possible."""


@functools.cache
def check() -> bool:
    """Make sure that there is a sandbox on this machine.

    Returns:
        whether files outside of Python's own can't be read, which needs Landlock.

    Raises:
        Fault: there is none.
    """
    outcome, hides_files = _run(PROBE, STARTED_WITHIN)
    if outcome != "passed":
        raise Fault(f"the sandbox for programs that models write does not hold: its probe {outcome}")
    return hides_files


def run(program: str, seconds: float) -> str:
    """Run a program to its end: `passed`, `failed` or `timed out`; a program that exits by itself has failed.

    Args:
        program: its source.
        seconds: how long it may take.

    Raises:
        Fault: it could not be run.
    """
    return _run(program, seconds)[0]


def _run(program: str, seconds: float) -> tuple[str, bool]:
    secret = secrets.token_hex(16).encode()
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    limits = [os.getpid(), MEMORY, math.ceil(seconds) + 2]
    command = [sys.executable, "-P", "-s", "-S", str(SCRIPT), *map(str, limits), *packages]
    environment = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    with tempfile.TemporaryFile() as source, tempfile.TemporaryDirectory(prefix="cordee-") as folder:
        source.write(secret + b"\n" + program.encode("utf-8", "surrogatepass"))
        source.seek(0)
        with subprocess.Popen(  # noqa: S603 - the argument vector is our own
            command, cwd=folder, env=environment, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            bufsize=0, start_new_session=True,
        ) as process:  # fmt: skip
            out = cast("IO[bytes]", process.stdout)
            try:
                hides_files = _started(out)
                said = _said(out, len(secret), seconds)
            finally:
                process.kill()
    return {None: "timed out", secret: "passed"}.get(said, "failed"), hides_files


def _started(out: IO[bytes]) -> bool:
    """Wait until a process has given up what a program must not have; whether files are hidden from it."""
    said = _said(out, len(READY[False]), STARTED_WITHIN)
    if said not in READY:
        problem = (said + out.read()).decode() if said else "Python does not start"
        hint = "it needs Linux on x86_64 or aarch64 with seccomp"
        raise Fault(f"no sandbox for programs that models write: {problem}", hint=hint)
    return said == READY[True]


def _said(out: IO[bytes], size: int, seconds: float) -> bytes | None:
    """What a process writes next, at most so many bytes; None if it writes nothing for so long."""
    waiting = select.poll()
    waiting.register(out, select.POLLIN)
    return out.read(size) if waiting.poll(1000 * seconds) else None
