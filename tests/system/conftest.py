"""A Slurm of the tests' own: munged, slurmctld and three slurmd on this machine, on free ports and in a folder."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "pretrain")]

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = ("n1", "n2", "n3")
CONFIGURATION = """
ClusterName=cordee
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdTimeout=10
ReturnToService=2
KillWait=60
MinJobAge=600
MpiDefault=none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A cluster of three nodes on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "state").mkdir()
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        host = socket.gethostname().partition(".")[0]
        ports = free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        text = CONFIGURATION.format(folder=folder, host=host, controller=ports[0], nodes=nodes)
        (folder / "slurm.conf").write_text(text)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        self._start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        self.start_controller()
        for name in NODES:
            self.start_node(name)
        self.wait_for(lambda: self("sinfo", "--noheader", "--format=%T %D").split() == ["idle", str(len(NODES))])

    def __call__(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def start_controller(self) -> None:
        """Start slurmctld, which continues from what it has saved."""
        self._start("slurmctld", "slurmctld", "-D")

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._start(name, "slurmd", "-D", "-N", name)

    def kill(self, name: str) -> None:
        """Kill a daemon; of a node, all that it has started too, as a power failure would."""
        daemon = self.daemons.pop(name)
        for pid in [*(descendants(daemon.pid) if name in NODES else ()), *steps_of(self.folder, name), daemon.pid]:
            kill(pid)
        daemon.wait()

    def state(self, job: str) -> str:
        """The state of a job, such as RUNNING."""
        words = self("scontrol", "--oneliner", "show", "job", job).split()
        return next((word.partition("=")[2] for word in words if word.startswith("JobState=")), "")

    def reaches(self, job: str, *states: str, seconds: float = 300) -> str:
        """Wait until a job is in one of these states."""
        self.wait_for(lambda: self.state(job) in states, seconds)
        return self.state(job)

    def wait_for(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not condition():
            logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.log"))
            assert time.monotonic() < end, self("squeue", "--long") + self("sinfo") + logs
            time.sleep(0.3)

    def clear(self) -> None:
        """Cancel all jobs, and have all daemons run."""
        if "slurmctld" not in self.daemons:
            self.start_controller()
        self("scancel", "--full", "--signal=KILL", *self("squeue", "--noheader", "--format=%i").split())
        self("scancel", "--user=root")
        for name in NODES:
            if name not in self.daemons:
                self.start_node(name)
            self("scontrol", "update", f"nodename={name}", "state=resume")
        self.wait_for(lambda: self("squeue", "--noheader").strip() == "")
        self.wait_for(lambda: self("sinfo", "--noheader", "--format=%T").split() == ["idle"])

    def end(self) -> None:
        """End all that was started."""
        for name in (*NODES, "slurmctld", "munged"):
            if name in self.daemons:
                self.kill(name)

    def _start(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        if name == "munged":
            self.wait_for((self.folder / "munge.socket").exists)


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        with closing(one):
            pass
    return ports


def processes() -> Iterator[tuple[int, int, str]]:
    """The processes of this machine: number, parent's number, command line."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        yield int(path.name), parent, line


def descendants(pid: int) -> list[int]:
    """All that a process has started, directly or through others."""
    found, listed = [pid], list(processes())
    for one in found:
        found += [child for child, parent, _ in listed if parent == one]
    return found[1:]


def steps_of(folder: Path, node: str) -> list[int]:
    """What slurmstepd runs on a node: slurmstepd leaves its slurmd, and is known by its environment's files."""
    found = []
    for pid, _, line in list(processes()):
        if line.startswith("slurmstepd"):
            opened = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").glob("*") if path.is_symlink()]
            if any(f"{folder}/spool.{node}/" in name or f"{folder}/{node}.log" in name for name in opened):
                found += [pid, *descendants(pid)]
    return found


def kill(pid: int) -> None:
    """Kill a process, if it is still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.fixture(scope="session")
def the_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A running Slurm, for all tests of a session."""
    missing = [name for name in COMMANDS if not shutil.which(name)]
    if missing:
        pytest.skip(f"Slurm is not installed: {', '.join(missing)}")
    if os.geteuid():
        pytest.skip("Slurm's daemons start as root only")
    started = Slurm(tmp_path_factory.mktemp("slurm"))
    yield started
    started.end()


@pytest.fixture
def slurm(the_slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """A Slurm with no job in it, that the commands of the test speak to."""
    monkeypatch.setenv("SLURM_CONF", the_slurm.environment["SLURM_CONF"])
    the_slurm.clear()
    yield the_slurm
    the_slurm.clear()
