"""What all tests share: the repository's root, a store, toy stages, and small tokenizers of the known families."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOYS = str(ROOT / "tests" / "stages")
sys.path[:0] = [TOYS, str(ROOT / "tests" / "stock")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TOYS, os.environ.get("PYTHONPATH")]))
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[name] = "1"
for number in (
    signal.SIGINT,
    signal.SIGHUP,
):  # ignored by all that is started in the background
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)

Cordee = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cordee(tmp_path: Path) -> Cordee:
    """Runs the real command line in a folder of the test's own: `cordee("plan", "r.yaml")`."""

    def call(
        *arguments: str, cwd: Path = tmp_path, timeout: float = 120, within: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        command = [*within, sys.executable, "-P", "-c", "from cordee.cli import main; main()", *arguments]
        environment = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return call


@pytest.fixture
def no_network() -> tuple[str, ...]:
    """What runs the command behind it in a network of its own, with a loopback device and no way out."""
    within = ("unshare", "--net", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    try:
        subprocess.run([*within, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not make a network namespace")
    return within


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a text file into the test's folder."""

    def call(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return call


@pytest.fixture
def brook(write: Callable[[str, str], Path]) -> Path:
    """A recipe of two stages, the second of which reads the first."""
    text = (
        "name: brook\nstages:\n  spring: {uses: toys.spring}\n  pool: {uses: toys.spring, source: $spring/line.txt}\n"
    )
    return write("brook.yaml", text)


@pytest.fixture
def unflushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each time a resume point is marked: the bytes of `metrics.jsonl` that a power failure would take."""
    from cordee import files

    flushed: dict[str, int] = {}
    found: list[int] = []
    flush, write = os.fsync, files.write_json

    def seen(handle: int) -> None:
        flushed[str(Path(f"/proc/self/fd/{handle}").readlink())] = os.fstat(handle).st_size
        flush(handle)

    def marked(path: Path, value: dict[str, Any]) -> None:
        if path.name == "state.json":
            metrics = next(folder for folder in path.parents if folder.name == "out") / "metrics.jsonl"
            step = value["state"]["step"]  # later lines are written again by a training that goes on from here
            size = sum(len(line) for line in metrics.read_bytes().splitlines(True) if json.loads(line)["step"] <= step)
            assert size
            found.append(max(0, size - flushed.get(str(metrics), 0)) if str(metrics.parent) in flushed else size)
        write(path, value)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(files, "write_json", marked)
    return found
