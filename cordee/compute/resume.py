"""Resume points: the state of a training, whole or not there, checked by its hashes.

    resume/<step>/weights.safetensors     parameters and buffers by name
                  optimizer.safetensors   `<parameter>/<state>`, such as `model.norm.weight/exp_avg`
                  state.json              the step, what else the loop counts, and the SHA-256 of both

A point is written beside, flushed and renamed. The last two are kept: where the newer is damaged, the one before
it is used. Nothing is pickled. Random numbers need no state: training draws them from (seed, step, process).

A checkpoint of transformers' `Trainer`, which writes it file by file, becomes a point by `mark`.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cordee import files

KEPT = 2
STATE = "state.json"


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


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, gathered from the shards that the processes hold; all of them have to ask for it."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def save(
    folder: Path, state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, *, writes: bool
) -> None:
    """Write a resume point; every process has to call this, and the one that `writes` does.

    Args:
        folder: holds the points.
        state: JSON; `state["step"]` names the point.
        model: not wrapped by DDP.
        optimizer: over the model's parameters.
        writes: whether this is the main process.
    """
    weights = {name: full(tensor) for name, tensor in _tensors(model).items()}
    moments = {
        f"{name}/{key}": full(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    if not writes:
        return
    folder.mkdir(exist_ok=True)
    beside, target = folder / ".saving", folder / f"{state['step']}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    save_file(weights, beside / "weights.safetensors")
    save_file(moments, beside / "optimizer.safetensors")
    mark(beside, state)
    if target.exists():
        shutil.rmtree(target)
    beside.rename(target)
    files.sync_folder(folder)
    for old in _points(folder)[:-KEPT]:
        shutil.rmtree(old)


def mark(folder: Path, state: Mapping[str, Any]) -> None:
    """Make a folder a resume point: flush it, and write the state with the hashes of its files, `state.json`, last."""
    (folder / STATE).unlink(missing_ok=True)
    files.sync_tree(folder)
    hashes = {path.relative_to(folder).as_posix(): files.sha256(path) for path in files.walk(folder)}
    record = {"state": dict(state), "files": hashes}
    files.write_json(folder / STATE, {**record, "sha256": _digest(record)})


def newest(folder: Path) -> tuple[Point | None, list[str]]:
    """The newest whole point, and a line about each one that is damaged or was not finished; those are deleted."""
    problems: list[str] = []
    for path in reversed(_points(folder)):
        try:
            return Point(path, _checked(path)), problems
        except (OSError, KeyError, TypeError, ValueError) as error:
            problems.append(f"the state at step {_step(path)} is damaged ({error}): it is not used")
            shutil.rmtree(path)
    return None, problems


def restore(point: Point, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a point's weights and moments into a model, sharded or not, and its optimizer."""
    weights = load_file(point.folder / "weights.safetensors")
    moments = load_file(point.folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, tensor in _tensors(model).items():
            tensor.copy_(_placed_as(weights[name], tensor))
    parameters = dict(model.named_parameters())
    for name, value in moments.items():
        parameter = parameters[name.rpartition("/")[0]]
        # fused AdamW wants its count of steps beside the weights, and no shard of it
        placed = _placed_as(value, parameter) if value.ndim else value.to(parameter.device)
        optimizer.state[parameter][name.rpartition("/")[2]] = placed


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _placed_as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device, and in the shards, of another."""
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def _step(path: Path) -> int:
    """The step in a point's name: `500`, or `checkpoint-500` as `Trainer` has it."""
    return int(path.name.removeprefix("checkpoint-"))


def _points(folder: Path) -> list[Path]:
    """The folders of points, in the order of their steps."""
    found = (path for path in folder.glob("*") if path.name.removeprefix("checkpoint-").isdecimal())
    return sorted(found, key=_step)


def _checked(folder: Path) -> dict[str, Any]:
    """A point's state; raises `ValueError` where a file is not what was written."""
    record = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if record.pop("sha256") != _digest(record):
        raise ValueError(f"{STATE} is not what was written")
    for name, expected in record["files"].items():
        if files.sha256(folder / name) != expected:
            raise ValueError(f"{name} is not what was written")
    state: dict[str, Any] = record["state"]
    return state


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
