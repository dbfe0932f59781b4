"""New models that are wrapped in shards without having been in memory, and then filled module by module.

Each process holds one module whole at a time, and keeps its shards. What is drawn is what transformers draws into a
model in memory, bit for bit, whatever the number of processes: the generator is asked for the same numbers in the same
order, and what a constructor draws only for `_init_weights` to draw again is dropped.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from cordee import model_folder
from cordee.compute import shards
from cordee.errors import Fault

SMALL = 1 << 16
"""Values up to which a new tensor has memory from the start, with what its constructor gives it."""

Make = Callable[[], PreTrainedModel]
Put = Callable[[str, torch.Tensor], None]
Initialize = Callable[..., None]


class NotByModule(Exception):  # noqa: N818 - no error: the model has to be made whole
    """The architecture initializes a module's weights outside of that module, or not at all."""


def shapes(make: Make) -> PreTrainedModel:
    """The model that `make` gives, on torch's meta device."""
    with torch.device("meta"):
        return make()


def draw(make: Make, seed: int, put: Put) -> None:
    """Hand over each weight and buffer, whole, that `make` gives a model in memory after `torch.manual_seed(seed)`.

    Raises:
        NotByModule: the architecture is drawn otherwise; what was handed over is not to be used.
    """
    modules: list[nn.Module] = []
    with _initializing(lambda _initialize, module: modules.append(module)), _Sparse(draws=False):
        paths = {module: path for path, module in make().named_modules()}
    order, mode, done = iter([paths[module] for module in modules]), _Sparse(draws=True), set[str]()

    def one(initialize: Initialize, module: nn.Module) -> None:
        path = next(order)
        with _in_memory(module) as own, mode.only_in_memory():
            initialize(module)
            for name, tensor in own.items():
                if not tensor._version:  # noqa: SLF001 - the count of writes
                    raise NotByModule
                done.add(f"{path}.{name}")
                put(f"{path}.{name}", tensor.detach())

    torch.manual_seed(seed)
    with _initializing(one), mode:
        made = make()
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        if not tensor.is_meta:
            put(name, tensor.detach())
        elif name not in done:
            raise NotByModule


def read(make: Make, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill a model's tensors, by their names, from a folder's safetensors: of those in shards, only what is held.

    Raises:
        NotByModule: the files have weights under other names, as some of transformers' models rename them.
        Fault: values are not finite.
    """
    small = lambda initialize, module: None if _lacks_memory(module) else initialize(module)  # noqa: E731
    with _initializing(small), _Sparse(draws=False):
        made = make()
    for name, buffer in made.named_buffers():  # those that no file holds
        if buffer.is_meta:
            raise NotByModule
        shards.put(buffer, tensors[name])
    paths, state = model_folder.weights(folder), made.state_dict()
    parameters = dict(made.named_parameters())
    if any(path.suffix != ".safetensors" for path in paths):
        raise NotByModule
    with shards.Reader(paths) as reader:
        there = {name: reader.shape(name) for name in reader.names}
        if not there.keys() <= state.keys() or any(there.get(name) != one.shape for name, one in parameters.items()):
            raise NotByModule
        for name in there.keys() & tensors.keys():
            reader.fill(name, tensors[name])
            if not torch.isfinite(shards.held(tensors[name])).all():
                raise Fault(f"{name} holds values that are not finite", file=folder)


class _Sparse(TorchDispatchMode):
    """Large tensors have no memory; what is drawn into one is drawn, if asked for, and dropped."""

    def __init__(self, *, draws: bool) -> None:
        super().__init__()
        self.draws, self.is_strict = draws, False

    @contextmanager
    def only_in_memory(self) -> Iterator[None]:
        """Nothing may be written into a tensor without memory."""
        self.is_strict = True
        yield
        self.is_strict = False

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and not self.is_strict:
            size = 1
            for length in args[0]:
                size *= length
            if size > SMALL:
                given = {**given, "device": torch.device("meta")}
        if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor) and args[0].is_meta:  # noqa: SLF001
            if self.is_strict:
                raise NotByModule
            if self.draws and torch.Tag.nondeterministic_seeded in func.tags:
                func(torch.empty_like(args[0], device="cpu"), *args[1:], **given)
        return func(*args, **given)


@contextmanager
def _initializing(one: Callable[[Initialize, nn.Module], object]) -> Iterator[None]:
    """Within it, transformers hands each module that it would initialize to `one`, with what would do it."""
    real = PreTrainedModel._initialize_weights  # noqa: SLF001

    def instead(model: PreTrainedModel, module: nn.Module, *rest: Any) -> None:
        if not getattr(module, "_is_hf_initialized", False):
            one(lambda given: real(model, given, *rest), module)
            module._is_hf_initialized = True  # noqa: SLF001

    PreTrainedModel._initialize_weights = instead  # noqa: SLF001
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = real  # noqa: SLF001


def _lacks_memory(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


@contextmanager
def _in_memory(module: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Give memory to what a module itself holds without any, and take it away again."""
    held = {name: one for name, one in module._parameters.items() if one is not None and one.is_meta}  # noqa: SLF001
    for name, without in held.items():
        values = torch.empty_like(without, device="cpu")
        module._parameters[name] = nn.Parameter(values, requires_grad=without.requires_grad)  # noqa: SLF001
    yield {name: getattr(module, name) for name in held}
    module._parameters.update(held)  # noqa: SLF001
