"""Short trainings as real processes, killed or to their end, and what two of them have in common."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cordee import files
from cordee.certificate import Check, at_least, at_most
from cordee.errors import Fault
from cordee.stage import Context
from cordee.worker import die_with_parent

POLL_S = 0.01
CHANGE_LIMIT = {"float32": 1e-2, "bfloat16": 1e-1}
"""How far weights may lie apart at another number of processes, as a share of how far training moved them.

Sums are then rounded in another order; AdamW divides each gradient by its own size and so makes the rounding of
those near zero as large as any step.
"""
INHERITED = (
    *("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "MASTER_", "GROUP_", "ROLE_", "RANK", "LOCAL_", "WORLD_SIZE"),
    "OMP_NUM_THREADS",
)
"""Beginnings of the variables by which a launcher tells a process which one it is, and how many cores it has: not
these processes' own."""


@dataclass(frozen=True)
class Ended:
    """A training that came to its end."""

    out: Path

    def rows(self) -> dict[int, dict[str, Any]]:
        """What it logged of each step."""
        found = files.read_json_lines(self.out / "metrics.jsonl")
        return {row["step"]: row for row in found if "samples" in row}

    @property
    def precision(self) -> str:
        """What its matrices were multiplied in."""
        return str(files.read_json(self.out / "training.json")["precision"])

    def weights(self, place: str = ".") -> dict[str, torch.Tensor]:
        """Its weights by name, float32: the last ones, or those of a checkpoint."""
        return load_file(self.out / place / "model.safetensors")

    def resumed_from(self) -> int:
        """The step that it went on from; 0 where it ran in one go."""
        events = files.read_json_lines(self.out.parent / "events.jsonl")
        said = [event["text"] for event in events if event.get("text", "").startswith("goes on from step ")]
        return int(said[-1].rpartition(" ")[2]) if said else 0

    def shown(self) -> dict[str, Any]:
        """What a certificate tells of it."""
        return {
            "weights_sha256": files.sha256(self.out / "model.safetensors"),
            "samples": [row["samples"] for row in self.rows().values()],
            "losses": [row["loss"] for row in self.rows().values()],
            "resumed_from_step": self.resumed_from(),
        }


@dataclass(frozen=True)
class Trial:
    """A training that runs."""

    process: subprocess.Popen[bytes]
    folder: Path
    context: Context

    def to_end(self) -> Ended:
        """Wait for its end.

        Raises:
            Fault: it failed.
            Stopped: a stop was asked for.
        """
        while self.process.poll() is None:
            self._breathe()
        if self.process.returncode != 0:
            raise Fault(f"the training of the proof failed: {self._said()}", file=self.folder / "log.txt")
        return Ended(self.folder / "out")

    def kill_after(self, step: int) -> None:
        """Kill it with SIGKILL as soon as it has logged `step`.

        Raises:
            Fault: it ended before.
            Stopped: a stop was asked for.
        """
        metrics = self.folder / "out" / "metrics.jsonl"
        while max((row["step"] for row in files.read_json_lines(metrics)), default=0) < step:
            if self.process.poll() is not None:
                raise Fault(f"it ended before it could be killed: {self._said()}", file=self.folder / "log.txt")
            self._breathe()
        self._kill()
        if (self.folder / "out" / "training.json").exists():
            raise Fault("it ended before it could be killed", key="steps", hint="raise it")

    def _breathe(self) -> None:
        time.sleep(POLL_S)
        if self.context.stop_requested():
            self._kill()
            self.context.stop("a proof, which begins anew")

    def _kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _said(self) -> str:
        events = files.read_json_lines(self.folder / "events.jsonl")
        errors = [event["text"] for event in events if event["event"] == "error"]
        return errors[0] if errors else f"exit code {self.process.returncode}"


def start(settings: dict[str, Any], folder: Path, context: Context) -> Trial:
    """Start `pretrain.train` with these settings, in a session of its own."""
    folder.joinpath("out").mkdir(parents=True, exist_ok=True)
    events = folder / "events.jsonl"
    told = {"config": settings, "seed": context.seed, "out": str(folder / "out"), "events": str(events)}
    files.write_text(folder / "job.json", json.dumps(told))
    argv = [*_launcher(**settings["launch"]), "-m", "pretrain.train", "--job", str(folder / "job.json")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - the argument vector is our own
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, which waits for no other thread
        )  # fmt: skip
    return Trial(process, folder, context)


def _launcher(num_processes: int, config_file: str | None) -> list[str]:
    """How a training is started: by accelerate where a configuration asks for more than processes."""
    if config_file:
        accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
        return [*accelerate, "--config_file", config_file, "--num_processes", f"{num_processes}"]
    if num_processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]


def other_processes(processes: int) -> int | None:
    """Another number of processes that this machine can run; None where it has a single accelerator."""
    if processes > 1:
        return 1
    return None if torch.cuda.device_count() == 1 else 2


def same_bits(one: Ended, other: Ended) -> list[Check]:
    """Checks that a continued training is the uninterrupted one."""
    first, second = one.weights(), other.weights()
    names = first.keys() | second.keys()
    differing = sum(name not in first or name not in second or not first[name].equal(second[name]) for name in names)
    steps = one.rows().keys() | other.rows().keys()
    losses = sum(one.rows().get(step, {}).get("loss") != other.rows().get(step, {}).get("loss") for step in steps)
    resumed = other.resumed_from()
    return [
        at_least("went on from a resume point (its step)", resumed, 1),
        at_most("steps whose samples differ", _differing_samples(one, other), 0),
        at_most("steps whose loss differs in any bit", losses, 0),
        at_most("weight tensors that differ in any bit", differing, 0),
    ]


def same_within_rounding(one: Ended, other: Ended) -> list[Check]:
    """Checks that a training at another number of processes is the same but for rounding."""
    begun, first, second = one.weights("checkpoints/1"), one.weights(), other.weights()
    apart = _norm([second[name] - first[name] for name in first])
    moved = _norm([first[name] - begun[name] for name in first])
    distance = "weights at another number of processes: distance as a share of what training moved them"
    return [
        at_most("steps whose samples differ at another number of processes", _differing_samples(one, other), 0),
        at_most(distance, apart / moved, CHANGE_LIMIT[one.precision]),
    ]


def _differing_samples(one: Ended, other: Ended) -> int:
    steps = one.rows().keys() | other.rows().keys()
    return sum(one.rows().get(step, {}).get("samples") != other.rows().get(step, {}).get("samples") for step in steps)


def _norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())
