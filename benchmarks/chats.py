"""From the start of a process to its first optimizer step on many chats: time and memory, beside TRL's own script.

    python benchmarks/chats.py MODEL [--chats 100000]

Makes a file of chats, and trains one step on it: by `posttrain.sft` twice, the second time with the chats that the
first has tokenized, and by TRL's script. Memory is the largest sum over the process and its children of what each has
for itself and its share of what several have (PSS), looked at every half second.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
TRAINER = {"max_steps": 1, "max_length": 512, "learning_rate": 1e-4, "bf16": False}
ROWS = 8
WORDS = ("alpine", "lake", "winter", "bread", "station", "letter", "quiet", "border", "music", "paper", "number")


def main() -> None:
    """Run the three arms and print seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder with a chat template that TRL can train on")
    parser.add_argument("--chats", type=int, default=100_000, help="how many chats")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        place = Path(folder)
        file, model = _chats(place, asked.chats), asked.model.resolve()
        print(f"{asked.chats:,} chats, {file.stat().st_size / 1e6:.0f} MB", flush=True)
        for name in ("first start", "second start"):
            _told(name, _cordee(place, model, file))
        _told("TRL's script", _trl(place, model, file))


def _chats(place: Path, count: int) -> Path:
    """A file of chats of one to three turns, about 620 bytes each."""
    drawn, file = random.Random(0), place / "chats.jsonl"  # noqa: S311 - no secrets
    with file.open("w", encoding="utf-8") as opened:
        for _ in range(count):
            turns = [(role, " ".join(drawn.choices(WORDS, k=drawn.randint(8, 30)))) for _ in range(drawn.randint(1, 3))
                     for role in ("user", "assistant")]  # fmt: skip
            opened.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return file


def _cordee(place: Path, model: Path, file: Path) -> tuple[float, float]:
    config = {"model": str(model), "data": [{"path": str(file)}], "trainer": TRAINER, "global_batch_size": ROWS}
    written = place / "alone.yaml"
    written.write_text(json.dumps(config))
    found = _measured(
        [sys.executable, "-m", "posttrain.sft", "--config", str(written), "--runs", str(place / "runs")], place
    )
    shutil.rmtree(place / "runs" / written.stem)  # the artifact; what is tokenized stays in the cache
    return found


def _trl(place: Path, model: Path, file: Path) -> tuple[float, float]:
    config = {
        "model_name_or_path": str(model), "datasets": [{"path": "json", "data_files": str(file)}],
        "output_dir": str(place / "trl"), "assistant_only_loss": True, "gradient_checkpointing": False,
        "per_device_train_batch_size": ROWS, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
        "save_strategy": "no", "report_to": "none", **TRAINER,
    }  # fmt: skip
    written = place / "trl.yaml"
    written.write_text(json.dumps(config))
    return _measured([sys.executable, "-m", "trl.scripts.sft", "--config", str(written)], place)


def _measured(command: list[str], place: Path) -> tuple[float, float]:
    """Seconds and bytes of a process; a failed one ends the benchmark."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    own = {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "HF_HOME": str(place / "hf")}
    log = place / "log.txt"
    with log.open("w") as told:
        began = time.monotonic()
        process = subprocess.Popen(command, env={**os.environ, **offline, **own}, cwd=place, stdout=told, stderr=told)
        largest = 0.0
        while process.poll() is None:
            largest = max(largest, _memory(process.pid))
            time.sleep(0.5)
        seconds = time.monotonic() - began
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{log.read_text()[-2000:]}")
    return seconds, largest


def _memory(pid: int) -> float:
    """Bytes of a process and its children; 0 of what has just ended."""
    total = 0.0
    try:
        found = psutil.Process(pid)
        for process in (found, *found.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.NoSuchProcess:
        pass
    return total


def _told(name: str, measured: tuple[float, float]) -> None:
    seconds, largest = measured
    print(f"{name:12} {seconds:6.1f} s  {largest / 1e9:5.2f} GB", flush=True)


if __name__ == "__main__":
    main()
