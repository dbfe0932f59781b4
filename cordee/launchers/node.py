"""Runs one node's part of a job that several nodes share: `srun python -m cordee.launchers.node … -- COMMAND`.

COMMAND is that of `launchers.command` for several nodes; it is completed by this node's number, which Slurm tells, and
by where the processes meet.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cordee.launchers.command import ACCELERATE
from cordee.machine import die_with_parent


def completed(argv: Sequence[str], number: int, address: str, port: int) -> list[str]:
    """A command with the options that differ from node to node, and from start to start.

    Raises:
        ValueError: it is none of accelerate's launcher.
    """
    at = list(argv).index(ACCELERATE) + 1
    meeting = ("--machine_rank", str(number), "--main_process_ip", address, "--main_process_port", str(port))
    return [*argv[:at], *meeting, *argv[at:]]


def peak_file(log: Path, number: int) -> Path:
    """Where a node's peak memory is written, in bytes."""
    return log.with_name(f"peak.{number}")


def _begin() -> None:
    """What the new process does before its command: it may be ended by a signal again, and dies with this one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m cordee.launchers.node", allow_abbrev=False)
    parser.add_argument("--address", required=True, help="of the first node")
    parser.add_argument("--port", required=True, type=int, help="a free one of the first node")
    parser.add_argument("--log", required=True, type=Path, help="the job's; peak memory is written beside it")
    parser.add_argument("command", nargs="+")
    told = parser.parse_args()
    number = int(os.environ["SLURM_NODEID"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it to all; the processes save, and are awaited
    process = subprocess.Popen(  # noqa: S603 - the argument vector is our own
        completed(told.command, number, told.address, told.port),
        preexec_fn=_begin,  # noqa: PLW1509 - two system calls, which wait for no other thread
    )
    _, status, usage = os.wait4(process.pid, 0)
    exit_code = process.returncode = os.waitstatus_to_exitcode(status)
    peak_file(told.log, number).write_text(str(usage.ru_maxrss * 1024))
    sys.exit(exit_code if exit_code >= 0 else 128 - exit_code)


if __name__ == "__main__":
    main()
