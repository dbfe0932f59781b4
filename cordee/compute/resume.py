"""Resume points: the state of a training, whole or not there, checked by its hashes.

    resume/<step>/shard-<process>-of-<processes>.safetensors   what one process held of the weights and moments
                  state.json                                    the step, what else the loop counts, each file's SHA-256

A shard holds parameters and buffers by their names, and moments as `<parameter>/<state>`, such as
`model.norm.weight/exp_avg`. Its header says at which offset of the whole tensor a part lies, as torch's
`HuggingFaceStorageReader` reads it; nothing is pickled. So a point does not depend on the number of processes: each
one reads the slices of what it holds itself.

A point is written beside, by all processes, flushed and renamed by the main one. The last two are kept: where the
newer is damaged, the one before it is used. Random numbers need no state: training draws them from (seed, step,
process).

A checkpoint of transformers' `Trainer`, which writes it file by file, becomes a point by `mark`.
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import distributed, nn

from cordee import files
from cordee.compute import shards
from cordee.errors import Fault, from_system
from cordee.stage import Context

KEPT = 2
STATE = "state.json"
WRITING = ".saving-"
"""What the name of a point's folder begins with until the point is whole."""


@dataclass(frozen=True)
class Point:
    """A resume point that is whole."""

    folder: Path
    state: dict[str, Any]
    """What `save` or `mark` was given; holds `step`."""

    @property
    def step(self) -> int:
        """The optimizer step after which it was written."""
        return int(self.state["step"])


class Saver:
    """Writes a training's resume points beside it, in a thread; every process has one and calls the same of it.

    `save` hands the state over and returns. The thread copies what this process holds into host memory, which the next
    optimizer step waits for, and writes the copy while the training goes on. What goes wrong there is raised by the
    next optimizer step, save or `wait`.
    """

    def __init__(self, context: Context, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write to `<out>/resume`.

        Args:
            context: where to write; told how long each save took.
            model: not wrapped by DDP.
            optimizer: over the model's parameters; it alone changes them, at its `step`.
        """
        self.context, self.model, self.optimizer = context, model, optimizer
        self.folder = context.out / "resume"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="resume point")
        self._writing: Future[None] | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._memory = shards.Memory()
        self._blocked_s = 0.0
        several = distributed.is_initialized() and distributed.get_world_size() > 1
        self._rank = distributed.get_rank() if several else 0
        # a group of its own: its collectives run beside those of the training
        self._group = distributed.new_group(backend="gloo") if several else None
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # as accelerate wraps it
        inner.register_step_pre_hook(lambda *_: self._before_step())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the point that is being written."""
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def save(self, state: Mapping[str, Any]) -> None:
        """Begin to write a resume point, once the one before is written.

        Args:
            state: JSON; `state["step"]` names the point.

        Raises:
            Fault: a process could not write the one before.
        """
        began = time.perf_counter()
        self.wait()
        shards.reshard(self.model)
        held = _tensors(self.model) | _moments(self.model, self.optimizer)
        for name, buffer in self.model.named_buffers():
            held[name] = buffer.detach().clone()  # a forward pass may change it
        self._copied.clear()
        kept = json.loads(json.dumps(state))
        ready = shards.now(next(iter(held.values())).device)
        self._blocked_s = time.perf_counter() - began
        self._writing = self._thread.submit(self._write, kept, held, ready)

    def wait(self) -> None:
        """Wait until the last point is written.

        Raises:
            Fault: a process could not write it.
        """
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _before_step(self) -> None:
        began = time.perf_counter()
        self._copied.wait()
        self._blocked_s += time.perf_counter() - began
        if self._writing is not None and self._writing.done():
            self.wait()

    def _write(self, state: dict[str, Any], held: Mapping[str, torch.Tensor], ready: torch.Event | None) -> None:
        """Write this process's shard, and in the main process make all of them a point."""
        began = time.perf_counter()
        try:
            self._memory.fill(shards.parts(held), ready)
        finally:
            self._copied.set()
        beside = self.folder / f"{WRITING}{state['step']}"
        count = distributed.get_world_size(self._group) if self._group else 1
        name = f"shard-{self._rank}-of-{count}.safetensors"

        def write() -> tuple[str, str]:
            beside.mkdir(parents=True, exist_ok=True)
            return name, self._memory.write(beside / name)

        hashes = dict(self._together(write))
        self._together(lambda: self._commit(beside, state, hashes) if self._rank == 0 else None)
        self.context.saved(state["step"], self._blocked_s, time.perf_counter() - began)

    def _commit(self, beside: Path, state: dict[str, Any], hashes: dict[str, str]) -> None:
        """Make what all processes wrote a point, and drop the oldest."""
        self.context.flush()
        for path in beside.iterdir():
            if path.name not in hashes:  # of an attempt that was killed
                path.unlink()
        _seal(beside, state, hashes)
        target = self.folder / f"{state['step']}"
        if target.exists():  # written before a resume, with the same bits
            shutil.rmtree(beside)
        else:
            beside.rename(target)
        files.sync_folder(self.folder)
        for old in _points(self.folder)[:-KEPT]:
            shutil.rmtree(old)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` returned in each process; raises `Fault` in all of them where it failed in one."""
        try:
            done: tuple[Any, str] = work(), ""
        except OSError as error:
            done = None, str(from_system(error, self.folder))
        found = [done]
        if self._group is not None:
            found *= distributed.get_world_size(self._group)
            distributed.all_gather_object(found, done, group=self._group)
        for problem in (problem for _, problem in found if problem):
            raise Fault(f"the resume point can't be written: {problem}")
        return [result for result, _ in found]


def mark(folder: Path, state: Mapping[str, Any]) -> None:
    """Make a folder a resume point: flush it, and write the state with the hashes of its files, `state.json`, last."""
    (folder / STATE).unlink(missing_ok=True)
    files.sync_tree(folder)
    _seal(folder, state, {path.relative_to(folder).as_posix(): files.sha256(path) for path in files.walk(folder)})


def newest(folder: Path) -> tuple[Point | None, list[str]]:
    """The newest whole point, and a line about each one that is damaged or was not finished; those are deleted."""
    for unfinished in folder.glob(f"{WRITING}*"):
        shutil.rmtree(unfinished)
    problems: list[str] = []
    for path in reversed(_points(folder)):
        try:
            return Point(path, _checked(path)), problems
        except (OSError, KeyError, TypeError, ValueError) as error:
            problems.append(f"the state at step {_step(path)} is damaged ({error}): it is not used")
            shutil.rmtree(path)
    return None, problems


def at(folder: Path, step: int) -> Point:
    """The point of a step that the main process has found whole.

    Raises:
        Fault: this process does not see it.
    """
    path = folder / f"{step}"
    try:
        return Point(path, _record(path)["state"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise Fault(f"not every process sees the state at step {step}", file=folder) from error


def restore(point: Point, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a point's weights and moments into a model, sharded or not, and its optimizer; each process reads its own.

    Raises:
        Fault: the point lacks a part of a tensor.
    """
    shards.reshard(model)
    with shards.Reader(sorted(point.folder.glob("*.safetensors"))) as reader:
        for name, tensor in _tensors(model).items():
            reader.fill(name, tensor)
        parameters = dict(model.named_parameters())
        for name in reader.names:
            parameter = parameters.get(name.rpartition("/")[0])
            if parameter is not None:
                optimizer.state[parameter][name.rpartition("/")[2]] = reader.read_like(name, parameter)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _step(path: Path) -> int:
    """The step in a point's name: `500`, or `checkpoint-500` as `Trainer` has it."""
    return int(path.name.removeprefix("checkpoint-"))


def _points(folder: Path) -> list[Path]:
    """The folders of points, in the order of their steps."""
    found = (path for path in folder.glob("*") if path.name.removeprefix("checkpoint-").isdecimal())
    return sorted(found, key=_step)


def _seal(folder: Path, state: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """Write `state.json`, which makes a folder of flushed files with these hashes a point."""
    record = {"state": dict(state), "files": dict(hashes)}
    files.write_json(folder / STATE, {**record, "sha256": _digest(record)})


def _record(folder: Path) -> dict[str, Any]:
    """What `_seal` wrote; raises `ValueError` where it is not that."""
    record: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if record.pop("sha256") != _digest(record):
        raise ValueError(f"{STATE} is not what was written")
    return record


def _checked(folder: Path) -> dict[str, Any]:
    """A point's state; raises `ValueError` where a file is not what was written, or a further one is there."""
    record = _record(folder)
    if added := {path.relative_to(folder).as_posix() for path in files.walk(folder)} - {STATE, *record["files"]}:
        raise ValueError(f"{min(added)} is no part of it")
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(files.sha256, [folder / name for name in record["files"]])
        for (name, expected), found in zip(record["files"].items(), hashes, strict=True):
            if found != expected:
                raise ValueError(f"{name} is not what was written")
    state: dict[str, Any] = record["state"]
    return state


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
