"""Starts a job on this machine."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from cordee.launchers import Job

# Loaded here and not below: between fork and exec nothing may be imported or waited for.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Have this process killed when the one that started it ends (Linux: prctl(2), option 1); exec keeps it so."""
    if _LIBC:
        _LIBC.prctl(1, signal.SIGKILL)


def start(job: Job) -> subprocess.Popen[bytes]:
    """Start a job in a session of its own: Ctrl-C reaches this process, which asks the job to stop."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - the argument vector is our own
            job.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **job.environment},
            cwd=Path.cwd(),
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, which waits for no other thread
        )
