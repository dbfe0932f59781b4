"""The command that starts a stage: `python -m <uses>`, or `accelerate launch -m <uses>` for several processes."""

import json
import sys
from pathlib import Path

from cordee import files, machine
from cordee.config import AccelerateConfig, Config, Launch

ACCELERATE = "accelerate.commands.launch"


def of_stage(uses: str, config: Config, job_file: Path, nodes: int = 1) -> tuple[str, ...]:
    """The argument vector for a stage whose job is in `job_file`; on several nodes, `launchers.node` completes it."""
    module = ("-m", uses, "--job", str(job_file))
    if not (isinstance(config, AccelerateConfig) and config.is_launched):
        return (sys.executable, *module)
    launch = config.launch
    if launch.num_processes == 1 and launch.config_file is None:
        return (sys.executable, *module)  # accelerate's launcher would only import torch once more, for two seconds
    settings = launch.config_file or str(_settings(launch, job_file.with_name("accelerate.yaml"), nodes))
    # What `accelerate launch` calls, with this interpreter's accelerate whatever the PATH says; five seconds sooner.
    accelerate = (sys.executable, "-m", ACCELERATE)
    machines = ("--num_machines", str(nodes), "--same_network") if nodes > 1 else ()
    return (*accelerate, "--config_file", settings, "--num_processes", str(launch.num_processes), *machines, *module)


def _settings(launch: Launch, path: Path, nodes: int) -> Path:
    """Write an accelerate configuration for several processes, so that no default of the user's home is read."""
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        # With MULTI_CPU accelerate 1.15 silently starts one process; its launcher for GPUs starts several anywhere.
        "distributed_type": "MULTI_GPU",
        "num_machines": nodes,
        "machine_rank": 0,
        "num_processes": launch.num_processes,
        "mixed_precision": "no",  # the stage's own config says it
        "use_cpu": not machine.has_gpu(),
        "main_training_function": "main",
        "main_process_port": 0,
    }
    files.write_text(path, json.dumps(settings, indent=2))
    return path
