"""Runs a stage's module with FSDP2 on the CPU, in a process that `accelerate launch` has started.

torch shards over processes on the CPU; accelerate 1.15 uses FSDP only where the processes have accelerators
(`AcceleratorState.__init__`). So it is told here that they do, and `ACCELERATE_TORCH_DEVICE` that they compute on the
CPU. All else is its own.
"""

import runpy
import sys
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def main() -> None:
    def backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = backend
    module, *sys.argv[1:] = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
