"""What was asked for is what runs: devices, processes, precision and compilation, checked and never guessed.

`accelerate` has silent ways out. A configuration of several CPU processes (`MULTI_CPU`) starts one; FSDP on a CPU
runs DDP; a tracker that is not installed is left out; a model can stay unwrapped. Each is an error here.
"""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import filter_trackers
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from cordee import machine
from cordee.config import Launch
from cordee.errors import Fault, UserError
from cordee.launchers import RUNNER

COMPILING_PAYS_FLOPS = {"cpu": 2e13, "cuda": 5e16}
"""Training FLOPs from which compiling wins back its own time, by device: a minute or two of eager training."""

OWNED = "precision and compilation are the stage's own: say them in the recipe"


@dataclass(frozen=True)
class Asked:
    """What an accelerate configuration asks for."""

    cpu: bool
    sharded: bool


# torch has a new name for it, accelerate and transformers not yet
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
_ENDED_GROUPS: list[Any] = []


def default() -> torch.device:
    """The accelerator of this machine, or its CPU where it has none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def of_launch(launch: Launch) -> torch.device:
    """Where a training that `launch` starts would run."""
    return torch.device("cpu") if _asked(launch).cpu else default()


def set_determinism(*, deterministic: bool) -> None:
    """Let torch run only what gives the same bits twice, or what it likes; to be called before anything is computed.

    A resume can't be exact otherwise: a compiled embedding's gradient, say, is added up in whatever order threads come.
    """
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS has to be told beforehand
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # transformers reads it for its flash attention
        # It would fill every new tensor with NaN, to show code that reads what it has not written: 10 % of a step.
        torch.utils.deterministic.fill_uninitialized_memory = False


def require_own_precision(launch: Launch) -> None:
    """See that `accelerate launch` was told no precision and no compilation, which the libraries would take up.

    Raises:
        UserError: it was.
    """
    for name in ("mixed_precision", "dynamo_backend"):
        if os.environ.get(f"ACCELERATE_{name.upper()}", "no").lower() != "no":
            raise UserError(OWNED, file=launch.config_file, key=name)


def open_accelerator(
    launch: Launch,
    *,
    deterministic: bool = True,
) -> Accelerator:
    """The accelerator that `launch` asks for; precision and compilation are the stage's own.

    Raises:
        UserError: the configuration sets what is the stage's.
        Fault: what runs is not what was asked for.
    """
    set_determinism(deterministic=deterministic)
    require_own_precision(launch)
    accelerator = Accelerator(
        cpu=_asked(launch).cpu,
        mixed_precision="no",
        # a model's buffers are constants; each step would wait for the main process
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    require_launched(launch, accelerator.num_processes, accelerator.device)
    return accelerator


def open_trackers(accelerator: Accelerator, names: Sequence[str], folder: Path, project: str) -> None:
    """Start the trackers that `report_to` names; their files go to a folder. accelerate leaves out what is missing.

    Raises:
        UserError: one is not known, or not installed.
    """
    try:
        accelerator.log_with = filter_trackers(list(names), str(folder))
    except ValueError as error:
        raise UserError(str(error), key="report_to") from error
    installed = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    for name in names:
        if name not in installed:
            raise UserError(f"tracker {name!r} is not installed", key="report_to")
    if names:
        accelerator.project_configuration.logging_dir = str(folder)
        accelerator.init_trackers(project)


def end(accelerator: Accelerator) -> None:
    """End the trackers and the process group, and keep the group's memory until this process exits.

    Freed right after a collective, gloo's group holds the GIL while it waits for its thread, which needs the GIL to
    free that collective's tensors: the process would hang with its work done (torch 2.13).
    """
    if torch.distributed.is_initialized():
        _ENDED_GROUPS.append(torch.distributed.group.WORLD)
    accelerator.end_training()


def require_launched(launch: Launch, num_processes: int, device: torch.device) -> None:
    """See that the processes that run, and where, are those that `launch` asks for.

    Raises:
        UserError: the accelerate configuration sets what is the stage's.
        Fault: they are others, or the CPU was chosen because the launcher does not see this machine's accelerator.
    """
    asked = _asked(launch)
    is_generated = launch.config_file is None and launch.num_processes > 1 and RUNNER in os.environ
    if is_generated and asked.cpu and (seen := default()).type != "cpu":
        # the launcher reads /proc without torch; ROCm's driver, and NVIDIA's in WSL2, are not there
        raise Fault(
            f"torch sees {seen}, and {launch.num_processes} processes were started on the CPU",
            key="launch.config_file",
            hint="write launch.config_file=configs/accelerate/gpu.yaml, or cpu-2.yaml if the CPU is meant",
        )
    if num_processes != launch.num_processes:
        raise Fault(
            f"{launch.num_processes} processes were asked for, and {num_processes} run",
            file=launch.config_file,
            key="launch.num_processes",
            hint="on a CPU, several processes take distributed_type: MULTI_GPU with use_cpu: true",
        )
    if asked.cpu != (device.type == "cpu"):
        raise Fault(f"the CPU was asked for: {asked.cpu}, and {device} runs", file=launch.config_file)


def require_wrapped(model: nn.Module, num_processes: int, launch: Launch) -> None:
    """See that a prepared model is wrapped for the processes that run.

    Raises:
        Fault: each process would train a model of its own, or FSDP was asked for and something else runs.
    """
    sharded, kind = is_sharded(model), type(model).__name__
    if _asked(launch).sharded != sharded:
        raise Fault(f"FSDP was asked for: {not sharded}, and {kind} runs", file=launch.config_file, key="launch")
    if num_processes > 1 and not sharded and not isinstance(model, DistributedDataParallel):
        raise Fault(f"{num_processes} processes run, each with a {kind} of its own", key="launch")


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights lie in shards over the processes."""
    return isinstance(model, FSDPModule)


def resolve_compile(asked: str, flops: float, device: torch.device) -> tuple[bool, str]:
    """Whether to compile a training of so many FLOPs, and why in a few words.

    Raises:
        UserError: it was asked for, and this machine has no compiler.
    """
    if asked == "off":
        return False, "as asked"
    if device.type == "cuda":
        found, needed = importlib.util.find_spec("triton") is not None, "triton"
    else:
        found, needed = machine.cxx_compiler() is not None, "a C++ compiler"
    if asked == "on":
        if not found:
            raise UserError(f"this machine has no {needed.removeprefix('a ')}", key="compile", hint='say "off"')
        return True, "as asked"
    if not found:
        return False, f"this machine has no {needed.removeprefix('a ')}"
    pays = flops >= COMPILING_PAYS_FLOPS.get(device.type, float("inf"))
    return pays, f"{flops:.1e} FLOPs of training {'pay' if pays else 'do not pay'} for it"


def compile_module(module: nn.Module, *, dynamic: bool) -> None:
    """Have a module compiled where it stands, at its first call; what is compiled is kept in torch's cache.

    That cache leaves out graphs that switch autocast, as rotary embeddings do in transformers, though its key holds the
    state of autocast: without these marks a second start compiles again for seconds.
    """
    for name in ("_enter_autocast", "_exit_autocast"):
        inductor.unsafe_marked_cacheable_functions[f"torch.amp.autocast_mode.{name}"] = "1"
    module.compile(dynamic=dynamic)


@contextlib.contextmanager
def first_pass() -> Iterator[None]:
    """Around the first forward and backward pass of a training, which compiles it.

    Raises:
        Fault: a batch does not fit into the device's memory, or the model can't be compiled.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        key = "per_device_train_batch_size"
        hint = "lower it: the result does not depend on it"
        raise Fault("a batch does not fit into the device's memory", key=key, hint=hint) from error
    except TorchDynamoException as error:
        raise Fault(f"the model can't be compiled: {error}", key="compile", hint='say "off"') from error


def _asked(launch: Launch) -> Asked:
    """What the launch's accelerate configuration asks for, or this machine's own devices.

    A person's own `accelerate launch` is known by what it sets in the environment.
    """
    no_accelerator = not torch.cuda.is_available()
    if launch.config_file is None:
        return Asked(
            os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or no_accelerator,
            os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true",
        )
    file = Path(launch.config_file)
    try:
        settings: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"can't be read as YAML: {error}", file=file, key="launch.config_file") from error
    for name in ("mixed_precision", "dynamo_config"):
        if settings.get(name) not in (None, "no", {}):
            raise UserError(OWNED, file=file, key=name)
    sharded = settings.get("distributed_type") == "FSDP"
    if sharded and (settings.get("fsdp_config") or {}).get("fsdp_version") != 2:
        raise UserError("must be 2: FSDP's first version is not supported", file=file, key="fsdp_config.fsdp_version")
    return Asked(bool(settings.get("use_cpu", no_accelerator)), sharded)
