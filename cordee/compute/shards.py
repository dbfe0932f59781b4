"""Parts of tensors that lie in shards over processes: copied, written as safetensors, and read as slices.

A file holds what one process has of each tensor. Its header keeps the offset of each part in the whole tensor under the
key that `torch.distributed.checkpoint` has for it, so torch's `HuggingFaceStorageReader` reads the files as well.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cordee import files
from cordee.errors import Fault

CHUNK_BYTES = 1 << 24
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls them."""
READ_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
OFFSETS = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class Part:
    """What a process writes of a tensor."""

    name: str
    values: torch.Tensor
    offsets: tuple[int, ...]
    """Where it begins in the whole tensor."""


def reshard(model: nn.Module) -> None:
    """Give up the whole weights that a forward pass without a backward pass has left in FSDP2's outermost modules.

    Until then, `parameters()` gives these, and not the ones that are in shards and are trained.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def now(device: torch.device) -> torch.Event | None:
    """An event that is reached when all that was begun so far on an accelerator is done; None for the CPU."""
    return None if device.type == "cpu" else torch.accelerator.current_stream(device).record_event()


def parts(tensors: Mapping[str, torch.Tensor]) -> list[Part]:
    """What this process writes of the tensors that all processes hold, whole or in shards.

    What several processes hold alike is written by one of them: by the one that has the least so far.
    """
    found, loads = [], dict[int, list[int]]()
    for name, tensor in tensors.items():
        values, offsets = _held(tensor)
        mine, count = _replica(tensor)
        load = loads.setdefault(count, [0] * count)
        writer = load.index(min(load))
        load[writer] += tensor.numel() * tensor.element_size()
        if writer == mine and values.numel():
            found.append(Part(name, values, offsets))
    return found


def _held(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What this process holds of a tensor, in the same memory, and where that begins in the whole."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    if not all(isinstance(place, Shard | Replicate) for place in tensor.placements):
        raise Fault(f"a tensor placed as {tensor.placements} can't be saved in shards")
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offsets)


def held(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, in the same memory."""
    return _held(tensor)[0]


def put(whole: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy into a tensor, in shards or not, what this process holds of it."""
    target, starts = _held(tensor)
    inside = tuple(slice(start, start + size) for start, size in zip(starts, target.shape, strict=True))
    target.copy_(whole[inside])


def _replica(tensor: torch.Tensor) -> tuple[int, int]:
    """Of the processes that hold the same part of a tensor: which one this is, and how many they are."""
    if not isinstance(tensor, DTensor):
        return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    mine, count = 0, 1
    for axis, place in enumerate(tensor.placements):
        if isinstance(place, Replicate):
            size = tensor.device_mesh.size(axis)
            mine, count = mine * size + tensor.device_mesh.get_local_rank(axis), count * size
    return mine, count


class Memory:
    """Host memory that holds a copy of parts as their file will; it is kept from one copy to the next."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._header = b""

    def fill(self, given: Sequence[Part], ready: torch.Event | None = None) -> None:
        """Copy parts: those on an accelerator by a stream of its own, after `ready`."""
        placed, size = _placed(given)
        if self._bytes.numel() != size:
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=ready is not None)
        offsets = json.dumps({part.name: {"saved_offsets": part.offsets} for part in given})
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_VERSION": "1.0", OFFSETS: offsets}}
        stream = None if ready is None else torch.Stream(ready.device)
        with ExitStack() as stack:
            if stream is not None and ready is not None:
                stack.enter_context(stream)
                stream.wait_event(ready)
            for part, begin, end in placed:
                values = part.values
                entries[part.name] = {
                    "dtype": DTYPES[values.dtype], "shape": list(values.shape), "data_offsets": [begin, end]
                }  # fmt: skip
                copy = self._bytes[begin:end].view(values.dtype).view(values.shape)
                copy.copy_(values, non_blocking=stream is not None)
            if stream is not None:
                stream.synchronize()
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header

    def write(self, path: Path) -> str:
        """Write the copy to a file and flush it; returns the SHA-256 of what was written."""
        digest, content = hashlib.sha256(self._header), memoryview(self._bytes.numpy())
        with path.open("wb") as file:
            file.write(self._header)
            for start in range(0, len(content), CHUNK_BYTES):
                chunk = content[start : start + CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        files.sync_folder(path.parent)
        return digest.hexdigest()


def _placed(given: Iterable[Part]) -> tuple[list[tuple[Part, int, int]], int]:
    """Where the bytes of each part begin and end, the widest numbers first, so that all are aligned; and their sum."""
    placed, end = [], 0
    for part in sorted(given, key=lambda part: -part.values.element_size()):
        begin, end = end, end + part.values.numel() * part.values.element_size()
        placed.append((part, begin, end))
    return placed, end


class Reader:
    """Reads tensors from the files of all processes that wrote them, only what is asked for."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._open = ExitStack()
        self._found: dict[str, list[tuple[Any, tuple[int, ...], tuple[int, ...]]]] = {}
        """By name: the file, and where a part begins and ends in the whole tensor."""
        for path in paths:
            file = self._open.enter_context(safe_open(path, framework="pt"))
            offsets = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
            names = file.keys()
            for name in names:
                shape = file.get_slice(name).get_shape()
                begins = tuple(offsets[name]["saved_offsets"]) if name in offsets else (0,) * len(shape)
                ends = tuple(begin + size for begin, size in zip(begins, shape, strict=True))
                self._found.setdefault(name, []).append((file, begins, ends))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def names(self) -> list[str]:
        """Of all tensors, in a fixed order."""
        return sorted(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""
        return tuple(map(max, zip(*(ends for _, _, ends in self._found[name]), strict=True)))

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Fill a tensor: of one in shards, what this process holds.

        Raises:
            Fault: the files lack a part of it, or hold it in another shape.
        """
        if name not in self._found or self.shape(name) != tensor.shape:
            there = f"of shape {list(self.shape(name))}" if name in self._found else "not there"
            raise Fault(f"{name} is {there}, and the model has it of shape {list(tensor.shape)}")
        target, starts = _held(tensor)
        left = target.numel()
        for file, begins, ends in self._found[name]:
            own = [max(one, other) for one, other in zip(begins, starts, strict=True)]
            stops = [min(end, start + size) for end, start, size in zip(ends, starts, target.shape, strict=True)]
            if any(one >= other for one, other in zip(own, stops, strict=True)):
                continue
            inside = tuple(slice(a - b, z - b) for a, z, b in zip(own, stops, begins, strict=True))
            values = file.get_slice(name)[inside] if inside else file.get_tensor(name)
            target[tuple(slice(a - b, z - b) for a, z, b in zip(own, stops, starts, strict=True))] = values
            left -= math.prod(values.shape)
        if left:
            raise Fault(f"{left} values of {name} are not there")

    def read_like(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor on the device of another, and in its shards where it has its shape."""
        file, _, _ = self._found[name][0]
        shape, dtype = self.shape(name), READ_DTYPES[file.get_slice(name).get_dtype()]
        found = (
            torch.empty_like(like.detach(), dtype=dtype)
            if shape == like.shape
            else torch.empty(shape, dtype=dtype, device=like.device)
        )
        self.fill(name, found)
        return found
