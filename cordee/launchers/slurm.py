"""Starts a job on the nodes of the Slurm allocation that this process is in: one task a node, by srun."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cordee.cluster import Cluster
from cordee.errors import Fault, UserError
from cordee.launchers import Handle, Job, local, node

ENDS_WITHIN_S = 30.0
"""How long srun may take to end what it was told to end."""


class Step(local.Process):
    """A step of a Slurm job: srun, which runs here, and its tasks on the nodes."""

    def kill(self) -> None:
        """End its tasks, and wait for that: srun ends them when it is interrupted twice within a second."""
        end = time.monotonic() + ENDS_WITHIN_S
        while self.poll() is None and time.monotonic() < end:
            self.signal(signal.SIGINT)
            time.sleep(0.2)
        super().kill()

    def usage(self) -> int:
        """Peak memory of its largest process, in bytes, as the nodes have told it."""
        told = [node.peak_file(self.job.log, number) for number in range(self.job.nodes)]
        return max(int(path.read_text(encoding="utf-8")) for path in told)


def start_on(cluster: Cluster) -> Callable[[Job], Handle]:
    """What starts jobs in an allocation on a cluster: those for one node on this one, where they need no srun."""
    return lambda job: local.start(job) if job.nodes == 1 else Step(job, _srun(job, cluster))


def _srun(job: Job, cluster: Cluster) -> tuple[str, ...]:
    """The command that starts a job on several nodes.

    Raises:
        UserError: this is no allocation, or it has fewer nodes.
        Fault: Slurm does not answer.
    """
    if "SLURM_JOB_ID" not in os.environ:
        hint = "submit it as a job: cordee run RECIPE --cluster NAME"
        raise UserError(f"{job.name} needs {job.nodes} nodes, and this is no job of Slurm", hint=hint)
    hosts = told("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    if len(hosts) < job.nodes:
        raise UserError(f"{job.name} needs {job.nodes} nodes, and this job has {len(hosts)}")
    for number in range(job.nodes):
        node.peak_file(job.log, number).unlink(missing_ok=True)
    folder = Path.cwd()
    python = sys.executable
    options = [f"--nodes={job.nodes}", f"--ntasks={job.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    options += [f"--nodelist={','.join(hosts[: job.nodes])}", f"--job-name={job.name}"]
    options += [f"--cpus-per-task={job.cores}"] if job.cores else []
    prefix: list[str] = []
    if cluster.container:
        python = cluster.container.python
        options += cluster.container.options(folder)
        prefix = cluster.container.prefix(folder, with_gpus=cluster.gpus_per_node > 0)
    meeting = ("--address", _address(hosts[0]), "--port", str(_free_port()), "--log", str(job.log.resolve()))
    argv = [python if word == sys.executable else word for word in job.argv]
    start = (*prefix, python, "-m", "cordee.launchers.node", *meeting, "--", *argv)
    return ("srun", *options, *cluster.srun, *start)


def _address(host: str) -> str:
    """A node's address, as Slurm's own daemons reach it."""
    fields = told("scontrol", "--oneliner", "show", "node", host).split()
    return next((field.partition("=")[2] for field in fields if field.startswith("NodeAddr=")), host)


def _free_port() -> int:
    """A port that is free now on this node, which is the job's first."""
    with contextlib.closing(socket.socket()) as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
    return port


def told(*command: str) -> str:
    """What one of Slurm's commands prints.

    Raises:
        UserError: it is not installed.
        Fault: it failed; the last line that it wrote says why.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    except FileNotFoundError as error:
        raise UserError(f"Slurm's {command[0]} is not installed here", key="--cluster") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise Fault(f"{command[0]}: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout
