"""Resume points: the state of a training, whole or not there, checked by its hashes.

    resume/<step>/shard-<process>-of-<processes>.safetensors   what one process held of the weights and moments
                  own-<process>-of-<processes>.safetensors      what a process alone had, if anything
                  state.json                                    the step, what else the loop counts, each file's SHA-256

A shard holds the parameters that are trained and the buffers by their names, and moments as `<parameter>/<state>`, such
as `model.norm.weight/exp_avg`. Its header says at which offset of the whole tensor a part lies, as torch's
`HuggingFaceStorageReader` reads it; nothing is pickled. So a point does not depend on the number of processes: each
one reads the slices of what it holds itself.

A point is written beside, by all processes, flushed and renamed by the main one. The last two are kept: where the
newer is damaged, the one before it is used. Random numbers need no state: training draws them from (seed, step,
process).
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
from safetensors.torch import load_file
from torch import distributed, nn

from cordee import files
from cordee.compute import shards
from cordee.errors import Fault, from_system
from cordee.stage import Context

KEPT = 2
STATE, OWN = "state.json", "own"
WRITING = ".saving-"
"""What the name of a point's folder begins with until the point is whole."""


@dataclass(frozen=True)
class Point:
    """A resume point that is whole."""

    folder: Path
    state: dict[str, Any]
    """What `save` was given; holds `step`."""
    numbers: Mapping[str, float]
    """Moments that are plain numbers, as `<parameter>/<state>`."""

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
            optimizer: over the parameters that are trained; it alone changes them, at its `step`.
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

    def save(self, state: Mapping[str, Any], own: Mapping[str, torch.Tensor] | None = None) -> None:
        """Begin to write a resume point, once the one before is written.

        Args:
            state: JSON; `state["step"]` names the point.
            own: what this process has beside the model; only as many processes can go on from it.

        Raises:
            Fault: a process could not write the one before.
        """
        began = time.perf_counter()
        self.wait()
        shards.reshard(self.model)
        held = _tensors(self.model)
        for name, buffer in self.model.named_buffers():
            held[name] = buffer.detach().clone()  # a forward pass may change it
        moments = _moments(self.model, self.optimizer)
        held |= {name: value for name, value in moments.items() if isinstance(value, torch.Tensor)}
        kept = {"state": state, "numbers": {name: value for name, value in moments.items() if name not in held}}
        kept = json.loads(json.dumps(kept))
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in (own or {}).items()}
        self._copied.clear()
        ready = shards.now(next(iter(held.values())).device)
        self._blocked_s = time.perf_counter() - began
        self._writing = self._thread.submit(self._write, kept, held, copies, ready)

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

    def _write(
        self,
        kept: dict[str, Any],
        held: Mapping[str, torch.Tensor],
        own: dict[str, torch.Tensor],
        ready: torch.Event | None,
    ) -> None:
        """Write this process's files, and in the main process make all of them a point."""
        began, step = time.perf_counter(), kept["state"]["step"]
        try:
            self._memory.fill(shards.parts(held), ready)
        finally:
            self._copied.set()
        beside = self.folder / f"{WRITING}{step}"
        count = distributed.get_world_size(self._group) if self._group else 1
        shard, others = (f"{name}-{self._rank}-of-{count}.safetensors" for name in ("shard", OWN))

        def write() -> dict[str, str]:
            beside.mkdir(parents=True, exist_ok=True)
            written = {shard: self._memory.write(beside / shard)}
            if own:
                memory = shards.Memory()
                memory.fill([shards.Part(key, value, (0,) * value.ndim) for key, value in own.items()])
                written[others] = memory.write(beside / others)
            return written

        hashes = {name: digest for one in self._together(write) for name, digest in one.items()}
        self._together(lambda: self._commit(beside, kept, hashes) if self._rank == 0 else None)
        self.context.saved(step, self._blocked_s, time.perf_counter() - began)

    def _commit(self, beside: Path, kept: dict[str, Any], hashes: dict[str, str]) -> None:
        """Make what all processes wrote a point, and drop the oldest."""
        self.context.flush()
        for path in beside.iterdir():
            if path.name not in hashes:  # of an attempt that was killed
                path.unlink()
        record = {**kept, "files": hashes}
        files.write_json(beside / STATE, {**record, "sha256": _digest(record)})
        target = self.folder / f"{kept['state']['step']}"
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


def newest(folder: Path) -> tuple[Point | None, list[str]]:
    """The newest whole point, and a line about each one that is damaged or was not finished; those are deleted."""
    for unfinished in folder.glob(f"{WRITING}*"):
        shutil.rmtree(unfinished)
    problems: list[str] = []
    for path in reversed(_points(folder)):
        try:
            return _checked(path), problems
        except (OSError, KeyError, TypeError, ValueError) as error:
            problems.append(f"the state at step {path.name} is damaged ({error}): it is not used")
            shutil.rmtree(path)
    return None, problems


def at(folder: Path, step: int) -> Point:
    """The point of a step that the main process has found whole.

    Raises:
        Fault: this process does not see it.
    """
    path = folder / f"{step}"
    try:
        return _point(path, _record(path))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise Fault(f"not every process sees the state at step {step}", file=folder) from error


def restore(point: Point, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a point's weights and moments into a model, sharded or not, and its optimizer; each process reads its own.

    Raises:
        Fault: the point lacks a part of a tensor.
    """
    shards.reshard(model)
    parameters = dict(_trained(model))
    with shards.Reader(sorted(point.folder.glob("shard-*.safetensors"))) as reader:
        for name, tensor in _tensors(model).items():
            reader.fill(name, tensor)
        for name in reader.names:
            of, _, key = name.rpartition("/")
            if of in parameters:
                optimizer.state[parameters[of]][key] = reader.read_like(name, parameters[of])
    for name, value in point.numbers.items():
        of, _, key = name.rpartition("/")
        optimizer.state[parameters[of]][key] = value


def own(point: Point) -> dict[str, torch.Tensor]:
    """What this process alone had at a point, in host memory.

    Raises:
        Fault: another number of processes wrote it.
    """
    rank, count = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    there = sorted(point.folder.glob(f"{OWN}-*.safetensors"))
    if not there:
        return {}
    if len(there) != count:
        problem = f"the state at step {point.step} is of {len(there)} processes, and {count} run"
        hint = f"set launch.num_processes to {len(there)}, or delete {point.folder} to go on from the point before it"
        raise Fault(problem, file=point.folder, hint=hint)
    found: dict[str, torch.Tensor] = load_file(point.folder / f"{OWN}-{rank}-of-{count}.safetensors")
    return found


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained; what is frozen is read from where it was trained."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(_trained(model)), **dict(model.named_buffers())}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        f"{name}/{key}": value
        for name, parameter in _trained(model)
        for key, value in optimizer.state[parameter].items()
    }


def _points(folder: Path) -> list[Path]:
    """The folders of points, in the order of their steps."""
    return sorted((path for path in folder.glob("*") if path.name.isdecimal()), key=lambda path: int(path.name))


def _point(folder: Path, record: dict[str, Any]) -> Point:
    return Point(folder, record["state"], record["numbers"])


def _record(folder: Path) -> dict[str, Any]:
    """What stands in `state.json`; raises `ValueError` where it is not what was written."""
    record: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if record.pop("sha256") != _digest(record):
        raise ValueError(f"{STATE} is not what was written")
    return record


def _checked(folder: Path) -> Point:
    """A point; raises `ValueError` where a file is not what was written, or a further one is there."""
    record = _record(folder)
    if added := {path.relative_to(folder).as_posix() for path in files.walk(folder)} - {STATE, *record["files"]}:
        raise ValueError(f"{min(added)} is no part of it")
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(files.sha256, [folder / name for name in record["files"]])
        for (name, expected), found in zip(record["files"].items(), hashes, strict=True):
            if found != expected:
                raise ValueError(f"{name} is not what was written")
    return _point(folder, record)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
