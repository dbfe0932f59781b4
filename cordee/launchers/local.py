"""Starts a job on this machine."""

import os
import subprocess
from pathlib import Path

from cordee.launchers import Job
from cordee.machine import die_with_parent


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
