"""Starts a job as a process of this machine."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from cordee.launchers import Job
from cordee.machine import die_with_parent


class Process:
    """A job that runs in a session of its own: Ctrl-C reaches this process, which asks the job to stop."""

    def __init__(self, job: Job, argv: tuple[str, ...]) -> None:
        self.job = job
        self._exit_code: int | None = None
        self._peak_bytes = 0
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the argument vector is our own
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **job.environment},
                cwd=Path.cwd(),
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, which waits for no other thread
            )

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._collect(os.WNOHANG)

    def stop(self) -> None:
        """Ask it to save its state and end."""
        self.job.stop.touch()

    def kill(self) -> None:
        """End its session at once, and wait for that; what it started in other sessions dies with its parent."""
        if self.poll() is None:
            self.signal(signal.SIGKILL)
            self._collect(0)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def usage(self) -> int:
        """Peak memory of its largest process, in bytes, once it has ended."""
        return self._peak_bytes

    def _collect(self, options: int) -> int | None:
        """Its exit code, if it has ended (`os.WNOHANG`), or when it has (0)."""
        if self._exit_code is None:
            pid, status, usage = os.wait4(self._process.pid, options)
            if pid:
                self._exit_code = self._process.returncode = os.waitstatus_to_exitcode(status)
                self._peak_bytes = usage.ru_maxrss * 1024
        return self._exit_code


def start(job: Job) -> Process:
    """Start a job here.

    Raises:
        ValueError: it is for several machines.
    """
    if job.nodes != 1:
        raise ValueError(f"{job.name} is for {job.nodes} nodes")
    return Process(job, job.argv)
