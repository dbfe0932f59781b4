"""Why a stage's job ended: one function from what is seen of it to a cause.

The evidence is its exit code, the errors that its processes reported, the end of its log, and the kernel's count of
processes that it killed for memory. The messages are those of torch 2, NCCL, gloo, vLLM, CUDA, Slurm and Linux.
"""

import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cordee.errors import Stopped, UserError

Kind = Literal[
    "finished", "stopped", "user's error", "out of memory", "diverged", "hardware", "communication", "storage",
    "disk full", "preempted", "killed", "hang", "unknown",
]  # fmt: skip

TRANSIENT = {"hardware", "communication", "storage", "killed", "hang"}
"""A restart may mend these. Slurm starts a job that was preempted again; the others end again as they did."""

GONE = "the run was ended, and its processes with it"
"""The evidence of an attempt where nothing is left that could have told any."""
FAILURES = TRANSIENT | {"user's error", "out of memory", "diverged", "disk full", "unknown"}
"""Ends after which a stage has failed, unless it was restarted."""

HINTS: dict[str, str] = {
    "diverged": "lower the learning rate, or look at the data of this step",
    "disk full": "free some space, then run again",
    "preempted": "the next run continues from the last resume point",
}

PATTERNS: dict[Kind, tuple[str, ...]] = {
    "diverged": (
        *(r"\bloss is (nan|-?inf)\b", r"gradient's norm (nan|inf)\b", r"grad_norm is (nan|inf)\b"),
        r"returned nan values in its \d+th output",
        r"probability tensor contains either `inf`, `nan` or element < 0",
        r"log-probabilities of sampled tokens are not finite",
    ),
    "out of memory": (
        *(r"(CUDA|HIP|XPU|MPS) (backend )?out of memory", r"CUDA error: out of memory", r"OutOfMemoryError"),
        *(r"CUBLAS_STATUS_ALLOC_FAILED", r"CUDNN_STATUS_ALLOC_FAILED"),
        r"DefaultCPUAllocator: (can't allocate memory|not enough memory)",
        *(r"\bMemoryError\b", r"ArrayMemoryError", r"std::bad_alloc", r"Cannot allocate memory"),
        *(r"[Oo]ut of memory: Kill(ed)? process", r"oom-kill:constraint", r"oom[_-]kill event"),
        *(r"task \d+: Out Of Memory", r"Exceeded (job|step) memory limit"),
        *(r"No available memory for the cache blocks", r"KV cache is needed, which is larger than the available"),
        r"Free memory on device .* on startup",
    ),
    "disk full": (
        *(r"No space left on device", r"no space left on the disk", r"Disk quota exceeded", r"os error (28|122)\b"),
    ),
    "storage": (
        *(r"Stale (NFS )?file handle", r"Input/output error", r"Read-only file system", r"Remote I/O error"),
        *(r"Transport endpoint is not connected", r"Cannot send after transport endpoint shutdown"),
        *(r"os error (5|30|107|108|116|121)\b", r"PytorchStreamWriter failed writing file", r"file write failed"),
        r"out of shared memory\. Please try to raise your shared memory limit",
    ),
    "hardware": (
        *(r"uncorrectable ECC error", r"\bXid \(PCI", r"fallen off the bus", r"NVLink error", r"GPU is lost"),
        r"CUDA error: (unspecified launch failure|unknown error|hardware stack error|an illegal instruction)",
        r"CUDA error: (misaligned address|an illegal memory access was encountered|system not yet initialized)",
        r"CUDA error: (the launch timed out and was terminated|all CUDA-capable devices are busy or unavailable)",
        r"CUDA error: (driver shutting down|CUDA-capable device\(s\) is/are busy or unavailable)",
        *(r"CUBLAS_STATUS_EXECUTION_FAILED", r"CUDNN_STATUS_EXECUTION_FAILED", r"ncclUnhandledCudaError"),
        *(r"Unable to determine the device handle for GPU", r"HW Exception by GPU", r"DUE TO NODE FAILURE"),
    ),
    "preempted": (r"DUE TO PREEMPTION", r"DUE TO TIME LIMIT"),
}
"""What the last lines of a log, or a reported error, say of each cause; the first that is found counts."""

COMMUNICATION = (
    *(r"ncclRemoteError", r"ncclSystemError", r"ncclInternalError", r"NCCL communicator was aborted"),
    *(r"Watchdog caught collective operation timeout", r"IBV_WC_\w+_ERR", r"ibv_\w+ failed"),
    *(r"Connection closed by (remote )?peer", r"Connection reset by peer", r"Connection refused", r"Broken pipe"),
    *(r"No route to host", r"Network is unreachable", r"Application timeout caused pair closure"),
    *(r"Timed out waiting \d+ ?ms for (recv|send)", r"Timed out after \d+ seconds waiting for clients"),
    *(r"client socket has (timed out|failed to connect)", r"server socket has failed to (listen|bind)"),
    *(r"[Aa]ddress already in use", r"EADDRINUSE", r"Rendezvous(Timeout|Connection|Closed)Error", r"DistNetworkError"),
    *(r"wait timeout after \d+ms, keys", r"[Mm]onitoredBarrier"),
)
"""The processes that are left say so of one that was killed, too: looked for after that."""

_WORKER = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")
"""What torch's launcher logs of the first process that failed."""
_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1}
"""What a process is sent, and does not do itself."""


@dataclass(frozen=True)
class End:
    """How a job ended, as it is seen from outside."""

    exit_code: int
    """Negative for a signal; from 129 on, a signal that a launcher passes on as shells do."""
    errors: Sequence[Mapping[str, Any]] = ()
    """The `error` events of its processes."""
    lines: Sequence[str] = ()
    """The last ones of its log."""
    oom_kills: int = 0
    """Processes that the kernel killed for memory meanwhile."""
    hang: str = ""
    """What hung, where that is why it was ended."""
    dead: str = ""
    """Which process was found dead, where that is why the others were ended."""
    was_asked: bool = False
    """Whether it was asked to stop; a process that stops without has been told to by a launcher that ends the others
    of one that died, or by someone who does not know the run."""
    is_disk_full: bool = False
    """Whether the disk of its folder has no space: it can't have written why it ended."""


@dataclass(frozen=True)
class Cause:
    """Why a job ended."""

    kind: Kind
    text: str = ""
    """The evidence, in a line."""

    @property
    def is_transient(self) -> bool:
        """Whether a restart may mend it."""
        return self.kind in TRANSIENT

    @property
    def hint(self) -> str:
        """What to do."""
        return HINTS.get(self.kind, "")


def of(end: End) -> Cause:
    """The cause of an end."""
    errors = [error for error in end.errors if error["exit_code"] != Stopped.exit_code]
    has_stopped = end.exit_code == Stopped.exit_code or len(errors) < len(end.errors)
    said = [*(str(error["text"]) for error in errors), *reversed(end.lines)]
    if found := _by_itself(end, has_stopped=has_stopped) or _by_pattern(said) or _by_signal(end):
        return found
    if has_stopped and not errors:
        return Cause("killed", "it was told to end by a signal from outside")
    return _by_text(end, said, has_errors=bool(errors))


def _by_itself(end: End, *, has_stopped: bool) -> Cause | None:
    """The cause that the end shows without its log."""
    if end.hang:
        return Cause("hang", end.hang)
    if end.exit_code == 0 and not end.errors:
        return Cause("finished")
    if error := next((error for error in end.errors if error["exit_code"] == UserError.exit_code), None):
        return Cause("user's error", str(error["text"]))
    if has_stopped and end.was_asked:
        return Cause("stopped", str(next((error["text"] for error in end.errors), "interrupted")))
    return None


def _by_pattern(said: Sequence[str]) -> Cause | None:
    """The first cause that one of the patterns is found for."""
    for kind, patterns in PATTERNS.items():
        if text := _first(patterns, said):
            return Cause(kind, text)
    return None


def _by_signal(end: End) -> Cause | None:
    """The cause that a signal shows, of the job itself or of one of its processes."""
    for number, who in _signals(end):
        name = signal.Signals(number).name
        if number == signal.SIGKILL and end.oom_kills:
            return Cause("out of memory", f"{who} was killed by the kernel, which had no memory left")
        if number == signal.SIGBUS:  # of a file that is mapped: the disk fails, or /dev/shm is full
            return Cause(
                "storage", f"{who} ended by {name}: a file that it had mapped can't be read, or /dev/shm is full"
            )
        if number in _OUTSIDE:
            return Cause("killed", f"{who} was ended by {name} from outside")
    if end.dead and end.oom_kills:
        return Cause("out of memory", f"{end.dead}: the kernel, which had no memory left, has killed a process")
    return Cause("killed", end.dead) if end.dead else None


def _by_text(end: End, said: Sequence[str], *, has_errors: bool) -> Cause:
    """The cause that is left: communication, or none that is known."""
    if found := _first(COMMUNICATION, said):
        return Cause("communication", found)
    if end.exit_code == UserError.exit_code and not end.errors:
        return Cause("user's error", _last(end.lines))
    if end.is_disk_full:
        return Cause("disk full", "no space left on the disk")
    for number, who in _signals(end):
        return Cause("unknown", f"{who} crashed with {signal.Signals(number).name}")
    return Cause("unknown", said[0] if has_errors else f"exit code {end.exit_code}: {_last(end.lines)}")


def _signals(end: End) -> Iterator[tuple[int, str]]:
    """The signals that ended processes of the job, each with whose it was: the first process that failed, first."""
    for line in end.lines:
        if (found := _WORKER.search(line)) and (number := _number(int(found[1]))):
            yield number, f"rank {found[2]} (process {found[3]})"
    if number := _number(end.exit_code):
        yield number, "the job's process"


def _number(exit_code: int) -> int | None:
    """The signal that an exit code stands for; a stage that stops ends with that of SIGINT itself."""
    if exit_code == Stopped.exit_code:
        return None
    number = -exit_code if exit_code < 0 else exit_code - 128
    return number if number in set(signal.Signals) else None


def _first(patterns: Sequence[str], said: Sequence[str]) -> str:
    """The first text that one of the patterns is found in, shortened to what is read at a glance."""
    pattern = re.compile("|".join(patterns))
    return next((" ".join(text.split())[:400] for text in said if pattern.search(text)), "")


def _last(lines: Sequence[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")
