"""This machine as seen without torch: processor, memory, GPU, whether it computes in bfloat16, and its processes."""

import contextlib
import ctypes
import functools
import os
import platform
import shutil
import signal
import sys
import time
from pathlib import Path

from cordee.errors import UserError

GPUS = Path("/proc/driver/nvidia/gpus")
CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}
"""Processor flags; a CPU without them emulates bfloat16, and is slower with it than in float32."""
BFLOAT16_CAPABILITY = 8
"""The first major compute capability of NVIDIA GPUs with bfloat16 (Ampere)."""

LOOKS = 5
"""How often a process is looked at to see whether it is starved."""

# Loaded here and not below: between fork and exec nothing may be imported or waited for.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Send this process a signal when the one that started it ends (Linux: prctl(2), option 1); exec keeps it so."""
    if _LIBC:
        _LIBC.prctl(1, number)


def has_gpu() -> bool:
    """Whether NVIDIA's driver in /proc shows a GPU (not in WSL2), and `CUDA_VISIBLE_DEVICES` does not hide it."""
    return GPUS.is_dir() and os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() not in ("", "-1")


def gpu() -> str | None:
    """The model of the first NVIDIA GPU."""
    return next(iter(gpus()), None)


def gpus() -> list[str]:
    """The models of the NVIDIA GPUs."""
    return [name for path in sorted(GPUS.glob("*/information")) if (name := _value(path, "Model"))]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    if not has_gpu():
        return []
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in told.split(",")] if told else [str(index) for index in range(len(gpus()))]


def instruction_sets() -> list[str]:
    """The vector and matrix instructions that make a CPU fast, as far as it has them."""
    flags = set(_value(CPUINFO, "flags").split())
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def cxx_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a CPU."""
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    return next((found for name in names if (found := shutil.which(name))), None)


def memory_bytes() -> int:
    """All memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """The memory that a new process could have."""
    told = _value(Path("/proc/meminfo"), "MemAvailable").removesuffix(" kB")
    return int(told) * 1024 if told.isdigit() else memory_bytes()


def cpu() -> str:
    """The processor's name."""
    return _value(CPUINFO, "model name") or platform.processor() or platform.machine()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@functools.cache
def fast_precision() -> str:
    """`bfloat16` where the GPU, or without one the CPU, computes in it; else `float32`.

    Raises:
        UserError: the GPU's driver does not tell.
    """
    if has_gpu():
        is_fast = _compute_capability() >= BFLOAT16_CAPABILITY
    else:
        is_fast = not BFLOAT16_FLAGS.isdisjoint(_value(CPUINFO, "flags").split())
    return "bfloat16" if is_fast else "float32"


def started(pid: int) -> str | None:
    """Start time of a process of this machine (clock ticks since boot); None if it does not run."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in "ZX" else None  # a zombie has ended


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as SIGSTOP does it."""
    fields = _stat(pid)
    return bool(fields) and fields[0] == "T"


def is_starved(pid: int, seconds: float = 1.0, share: float = 0.25) -> bool:
    """Whether a process wants to compute all the while, and gets less than a share of one core; this takes seconds."""
    began = _cpu_s(pid)
    for _ in range(LOOKS):
        if not _is_runnable(pid):
            return False
        time.sleep(seconds / LOOKS)
    return _cpu_s(pid) - began < share * seconds


def _is_runnable(pid: int) -> bool:
    """Whether a thread of it computes or waits for a core."""
    threads = Path(f"/proc/{pid}/task")
    with contextlib.suppress(OSError):
        return any(_stat(f"{pid}/task/{thread.name}")[:1] == ["R"] for thread in threads.iterdir())
    return False


def _cpu_s(pid: int) -> float:
    """Seconds that its threads have computed."""
    fields = _stat(pid)
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def age_s(pid: int) -> float:
    """Seconds since a process was started; 0 where it does not run."""
    fields = _stat(pid)
    if not fields:
        return 0.0
    up_s = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    return max(0.0, up_s - int(fields[19]) / os.sysconf("SC_CLK_TCK"))


def oom_kills() -> int:
    """Processes of this machine that the kernel has killed for memory, those over a cgroup's limit included."""
    told = Path("/proc/vmstat")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _stat(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the third, its state, on; none if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _value(path: Path, name: str) -> str:
    """The value of the first line `name: value` of a file in /proc; empty where there is none."""
    if not path.exists():
        return ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _compute_capability() -> int:
    """The major compute capability of the first NVIDIA GPU, asked of its management library."""
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        failed = (
            nvml.nvmlInit_v2()
            or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
            or nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
        )
        nvml.nvmlShutdown()
    except (OSError, AttributeError) as error:
        raise _unknown(str(error)) from error
    if failed:
        raise _unknown(f"NVML error {failed}")
    return major.value


def _unknown(why: str) -> UserError:
    hint = "write bfloat16 or float32 instead of auto"
    return UserError(f"the GPU's driver does not tell whether it computes in bfloat16 ({why})", hint=hint)
