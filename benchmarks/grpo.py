"""Speed of a step of GRPO: completions by vLLM in the trainer's process, by transformers, and by TRL's own trainer.

    python benchmarks/grpo.py MODEL [--steps 6] [--precision float32]

All arms train the same adapter on the same prompts, each in a process of its own, in the order A B C C B A. The time of
a step is TRL's own figure, which holds sampling, new weights for vLLM, rewards, and both passes of the loss; the median
over the steps behind the first two. The time of new weights stands beside that of one copy of the same weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 2
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Run:
    """One training, measured, in seconds a step."""

    step_s: float
    sample_s: float
    """Of these, to sample."""
    sync_s: float
    """Of these, to give new weights."""
    tokens: float
    """Tokens of a completion."""


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing: the share of odd token ids."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def main() -> None:
    """Run each arm twice and print its times and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--completions", type=int, default=32, help="of a step")
    parser.add_argument("--tokens", type=int, default=128, help="of the longest completion")
    parser.add_argument("--arms", default="vllm,transformers,trl")
    parser.add_argument("--once", action="store_true", help="each arm once")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        _train_with_trl(asked, Path(asked.child))
        return
    arms = asked.arms.split(",")
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for number, name in enumerate(arms if asked.once else [*arms, *reversed(arms)]):
            place = Path(folder) / str(number)
            place.mkdir()
            run = (_trl if name == "trl" else _cordee)(asked, place, name)
            runs[name].append(run)
            print(f"{name:13} {run.step_s:7.2f} s a step: {run.sample_s:.2f} to sample, {run.sync_s:.3f} for new "
                  f"weights; {run.tokens:.0f} tokens a completion", flush=True)  # fmt: skip
    means = {name: statistics.mean(run.step_s for run in own) for name, own in runs.items()}
    for name, mean in means.items():
        print(f"{name:13} {mean:7.2f} s a step, {mean / means[arms[0]]:.2f} times that of {arms[0]}")
    copy = _copy_s(asked.model)
    sync = statistics.mean(run.sync_s for run in runs[arms[0]])
    print(f"new weights: {sync * 1e3:.0f} ms, {sync / copy:.2f} times a copy of the model's ({copy * 1e3:.0f} ms)")


def _prompts(place: Path) -> Path:
    file = place / "prompts.jsonl"
    rows = [{"prompt": f"A shop sells {n} loaves a day. How many are that in {n % 7 + 2} days?"} for n in range(200)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _cordee(asked: argparse.Namespace, place: Path, engine: str) -> Run:
    """Train by the stage."""
    config = {
        "model": str(asked.model.resolve()), "data": [{"path": str(_prompts(place))}], "engine": engine, "seed": 1,
        "rewards": [{"function": "grpo:length"}], "lora": LORA, "precision": asked.precision,
        "global_batch_size": asked.completions, "resume_steps": 1000,
        "trainer": {"max_steps": asked.steps, "max_completion_length": asked.tokens, "learning_rate": 1e-5},
    }  # fmt: skip
    file = place / "run.yaml"
    file.write_text(json.dumps(config))
    _run([sys.executable, "-m", "posttrain.grpo", "--config", str(file), "--runs", str(place / "runs")])
    (log,) = place.glob("runs/run/*@1/metrics.jsonl")
    return _measured([json.loads(line) for line in log.read_text().splitlines()])


def _trl(asked: argparse.Namespace, place: Path, _arm: str) -> Run:
    """Train by TRL's own trainer, in a process of its own."""
    own = [f"--steps={asked.steps}", f"--completions={asked.completions}", f"--tokens={asked.tokens}"]
    own += [f"--precision={asked.precision}", f"--child={place}"]
    _run([sys.executable, __file__, str(asked.model), *own])
    return _measured(json.loads((place / "log.json").read_text()))


def _train_with_trl(asked: argparse.Namespace, place: Path) -> None:
    """What that process does: TRL's trainer, without gradient checkpointing, which its default has."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from cordee import machine

    sampled: list[float] = []
    precision = machine.fast_precision() if asked.precision == "auto" else asked.precision
    arguments = GRPOConfig(
        output_dir=str(place / "out"), max_steps=asked.steps, max_completion_length=asked.tokens, use_cpu=True,
        per_device_train_batch_size=8, gradient_accumulation_steps=asked.completions // 8, learning_rate=1e-5,
        logging_steps=1, report_to="none", save_strategy="no", bf16=precision == "bfloat16", disable_tqdm=True,
        gradient_checkpointing=False, seed=1,
    )  # fmt: skip
    rows = [json.loads(line) for line in _prompts(place).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    if tokenizer.chat_template:
        rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            found = super()._generate_single_turn(*given, **named)
            sampled.append(time.perf_counter() - began)
            return found

    trainer = Timed(
        AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32), reward_funcs=length, args=arguments,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    kept = [{**row, "rollout_time": took, "sync_time": 0.0} for row, took in zip(log, sampled, strict=False)]
    (place / "log.json").write_text(json.dumps(kept))


def _run(command: list[str]) -> None:
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )  # fmt: skip
    if ended.returncode:
        sys.exit(f"{ended.stdout[-1000:]}\n{ended.stderr[-2000:]}")


def _measured(rows: list[dict[str, float]]) -> Run:
    """The medians over the steps behind the first ones."""
    kept = [row for row in rows if "loss" in row][SKIPPED:]
    names = ("step_time", "rollout_time", "sync_time", "completions/mean_length")
    return Run(*(statistics.median(row[name] for row in kept) for name in names))


def _copy_s(model: Path) -> float:
    """Seconds to copy all weights of a model once, in float32: the least of five tries."""
    import torch
    from safetensors.torch import load_file

    weights = [tensor.float() for file in sorted(model.glob("*.safetensors")) for tensor in load_file(file).values()]
    copies, times = [torch.empty_like(tensor) for tensor in weights], []
    for _ in range(5):
        began = time.perf_counter()
        for copy, tensor in zip(copies, weights, strict=True):
            copy.copy_(tensor)
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
