"""A pretraining of two processes under kill -9 at random moments, and whether it ends in the same bits.

    python benchmarks/kills.py [--kills 100] [--mean 5] [--seed 0] [--steps 3000]

Trains the tiny quickstart's base once undisturbed and once under kills, whose times are drawn with a mean of so many
seconds. What is killed is drawn as well: a rank, all ranks, their launcher, or `cordee` itself, which is then called
again. A third of the kills wait for a resume point that is being written. Prints what was killed, the steps that were
taken twice, the goodput, and whether the weights are the same; exit 1 where they are not.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "recipes" / "tiny" / "quickstart.yaml"
STAGES = ("corpus", "tokenizer", "tokens")
TARGETS = ("rank", "ranks", "launcher", "cordee")
WITHIN_A_SAVE, SAVE_S = 1 / 3, 0.05
"""The share of kills that wait for a save, and within how many seconds of its begin they come."""


@dataclass(frozen=True)
class Kill:
    """What was killed, after which step, and whether a resume point was being written then."""

    target: str
    step: int
    in_save: bool


class Run:
    """A call of `cordee stage`, and what its processes say."""

    def __init__(self, runs: Path, keys: list[str]) -> None:
        self.runs, self.keys = runs, keys
        self.folder = runs / "tiny" / "base@1.partial"
        self.heartbeats = runs / "tiny" / "logs" / "base@1" / "heartbeats"
        self.starts = 0
        self.start()

    def start(self) -> None:
        """Call it, again where it was killed."""
        self.starts += 1
        self.process = cordee("stage", str(RECIPE), "base", *self.keys, "--restarts", "1000", runs=self.runs)

    def beats(self) -> list[dict[str, Any]]:
        """The last word of each rank that has said one."""
        found = []
        for path in sorted(self.heartbeats.glob("[0-9]*")) if self.heartbeats.exists() else ():
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(path.read_bytes()))
        return found

    @property
    def is_saving(self) -> bool:
        """Whether a resume point is being written."""
        return any((self.folder / "resume").glob(".saving-*"))

    def kill(self, target: str, rng: random.Random) -> Kill | None:
        """Kill what is named; None where it does not run."""
        beats = self.beats()
        pids = [beat["pid"] for beat in beats if Path(f"/proc/{beat['pid']}").exists()]
        if not pids or self.process.poll() is not None:
            return None
        made = Kill(target, max(beat["step"] for beat in beats), self.is_saving)
        chosen = {
            "rank": lambda: [rng.choice(pids)],
            "ranks": lambda: pids,
            "launcher": lambda: [_parent(pids[0])],
            "cordee": lambda: [self.process.pid],
        }[target]()
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return made


def cordee(*words: str, runs: Path) -> "subprocess.Popen[bytes]":
    """Begin a command, with one thread a process."""
    command = [sys.executable, "-P", "-c", "from cordee.cli import main; main()", *words, "--runs", str(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def main() -> None:
    """Train twice, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--mean", type=float, default=5.0, help="seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000, help="of the training")
    parser.add_argument("--resume-steps", type=int, default=20, help="from one resume point to the next")
    asked = parser.parse_args()
    rng = random.Random(asked.seed)  # noqa: S311 - not a secret
    keys = [f"base.max_steps={asked.steps}", "base.launch.num_processes=2", f"base.resume_steps={asked.resume_steps}"]
    keys += ["base.compile=off", "base.decay_steps=10", "base.save_steps=[]", "base.eval_steps=0"]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        weights, kills = [], list[Kill]()
        for name in ("undisturbed", "killed"):
            runs = Path(folder) / name
            for stage in STAGES:
                if cordee("stage", str(RECIPE), stage, runs=runs).wait():
                    sys.exit(f"{stage} failed")
            began = time.monotonic()
            run = Run(runs, keys)
            if name == "killed":
                kills = _disturb(run, asked, rng)
            while run.process.wait():
                run.start()
            made = runs / "tiny" / "base@1"
            weights.append(hashlib.sha256((made / "model.safetensors").read_bytes()).hexdigest())
            print(f"{name}: {time.monotonic() - began:.0f} s, {run.starts} starts of cordee", flush=True)
        same = _tell(made, kills, same=len(set(weights)) == 1)
    sys.exit(0 if same else 1)


def _disturb(run: Run, asked: argparse.Namespace, rng: random.Random) -> list[Kill]:
    """Kill until so many kills are made or the training has ended."""
    kills: list[Kill] = []
    while len(kills) < asked.kills and not (run.runs / "tiny" / "base@1").exists():
        time.sleep(rng.expovariate(1 / asked.mean))
        if rng.random() < WITHIN_A_SAVE:
            end = time.monotonic() + 60
            while not run.is_saving and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, SAVE_S))
        if made := run.kill(rng.choice(TARGETS), rng):
            kills.append(made)
        if run.process.poll() is not None:
            run.start()
    return kills


def _tell(made: Path, kills: list[Kill], *, same: bool) -> bool:
    """Print what came of it."""
    told = json.loads((made / "manifest.json").read_text())["goodput"]
    rows = [json.loads(line) for line in (made.parent / "logs" / made.name / "events.jsonl").read_text().splitlines()]
    again, step = [], 0
    for row in rows:
        if row["event"] == "ended":
            step = row["step"]
        elif row["event"] == "resumed":
            again.append(max(0, step - row["step"]))
    counts = collections.Counter(kill.target for kill in kills)
    print(f"{len(kills)} kills: {', '.join(f'{name} {counts[name]}' for name in TARGETS)}; "
          f"{sum(kill.in_save for kill in kills)} while a resume point was written")  # fmt: skip
    print(f"steps taken twice after a kill: at most {max(again, default=0)}, {sum(again)} in all")
    shares = ", ".join(f"{name} {seconds / told['wall_s']:.1%}" for name, seconds in told["seconds"].items())
    print(f"of {told['wall_s']:.0f} s in {told['attempts']} attempts: {shares}")
    print("the weights are the same bits" if same else "THE WEIGHTS DIFFER")
    return same


if __name__ == "__main__":
    main()
