"""Speed of supervised fine-tuning: compiled, not compiled, an earlier checkout, and TRL's own script.

    python benchmarks/sft.py runs/quickstart/base@1 runs/quickstart/chats@1/messages.parquet --before CHECKOUT

All arms train the same model on the same chats in bfloat16, each in a process of its own, in the order A B C D D C B A.
They are packed in all arms but "TRL's script", which has TRL's defaults: a chat is a row, and gradients are
checkpointed. Speed is tokens without padding per second between two steps, by the times at which the steps were
reported; the first start of an arm has an empty compile cache, the second a warm one.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
from processes import Process

ROWS, LENGTH, SKIPPED_STEPS = 8, 256, 10
LOSS_LIMIT = 0.02
"""Largest difference, as a share, between the mean losses of a checkout's compiled and uncompiled training."""
TRAINER = {
    "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 5, "max_length": LENGTH, "bf16": True,
}  # fmt: skip
PACKED = {
    "packing": True, "gradient_checkpointing": False, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": ROWS,
}  # fmt: skip
"""What is fastest of TRL's on two cores."""
DOCUMENTED = {"per_device_train_batch_size": ROWS}
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Run:
    """One training, measured."""

    first_step_s: float
    """From the start of the process to the end of its first optimizer step, in seconds."""
    tokens_per_s: float
    """Without padding, from step `SKIPPED_STEPS` on."""
    loss: float
    """Mean over the same steps."""


def main() -> None:
    """Run each arm twice and print its speed and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder whose chat template marks the assistant's tokens")
    parser.add_argument("chats", type=Path, help="a parquet file with `messages`")
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of each training")
    asked = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        place = Path(folder)
        model = _without_manifest(asked.model, place)
        arms = {
            "compiled": lambda number: _cordee(ROOT, place, model, asked, number, compile="on"),
            "not compiled": lambda number: _cordee(ROOT, place, model, asked, number, compile="off"),
            "TRL, packed": lambda number: _trl(place, model, asked, number, PACKED),
            "TRL's script": lambda number: _trl(place, model, asked, number, DOCUMENTED),
        }
        if asked.before:
            arms["before"] = lambda number: _cordee(asked.before.resolve(), place, model, asked, number)
        runs: dict[str, list[Run]] = {name: [] for name in arms}
        for number, name in enumerate([*arms, *reversed(arms)]):
            run = arms[name](number)
            runs[name].append(run)
            print(f"{name:13} {run.tokens_per_s:7,.0f} tokens/s  first step after {run.first_step_s:4.0f} s"
                  f"  loss {run.loss:.4f}", flush=True)  # fmt: skip
    _summary(runs)


def _summary(runs: dict[str, list[Run]]) -> None:
    """Print the compiled training's speed as a ratio to each other arm; exit 1 where it learnt something else."""
    speeds = {name: statistics.mean(run.tokens_per_s for run in own) for name, own in runs.items()}
    for name, speed in speeds.items():
        print(f"{name:13} {speed:7,.0f} tokens/s  compiled is {speeds['compiled'] / speed:.2f} times as fast")
    print(f"compiled: first step after {runs['compiled'][-1].first_step_s:.1f} s with a warm cache")
    loss, reference = (statistics.mean(run.loss for run in runs[name]) for name in ("compiled", "not compiled"))
    if not abs(loss - reference) <= LOSS_LIMIT * reference:
        sys.exit(f"compiled, the mean loss is {loss:.4f} instead of {reference:.4f}")


def _without_manifest(model: Path, place: Path) -> Path:
    """A copy of a model folder that any version of the code reads."""
    copied = place / "model"
    copied.mkdir()
    for path in model.iterdir():
        if path.is_file() and path.name not in ("manifest.json", "recipe.yaml", "metrics.jsonl"):
            shutil.copy(path, copied)
    return copied


def _cordee(
    checkout: Path, place: Path, model: Path, asked: argparse.Namespace, number: int, **keys: str
) -> Run:  # fmt: skip
    """Train by the stage of a checkout, and read the steps' times from its events."""
    shared = {"global_batch_size": ROWS, "per_device_train_batch_size": ROWS, "logging_steps": 1, **keys}
    trainer = {**TRAINER, "packing": True, "max_steps": asked.steps}
    config = {"model": str(model), "data": [{"path": str(asked.chats.resolve())}], "trainer": trainer, **shared}
    file = place / f"run{number}.yaml"
    file.write_text(json.dumps(config))
    # Both starts of an arm have one folder, below which the compile cache is kept; the artifact goes.
    store = place / f"runs-{checkout.name}-{keys.get('compile', '')}"
    command = [sys.executable, "-m", "posttrain.sft", "--config", str(file), "--runs", str(store)]
    began = time.time()
    for _ in Process(command, place, checkout).lines():
        pass
    (events,) = store.glob(f"run{number}/logs/*/events.jsonl")
    rows = [json.loads(line) for line in events.read_text().splitlines()]
    steps = [(int(row["done"]), row["time"]) for row in rows if row.get("unit") == "steps" and row["done"]]
    (manifest,) = store.glob(f"run{number}/*@1/manifest.json")
    metrics = json.loads(manifest.read_text())["metrics"]
    (log,) = store.glob(f"run{number}/*@1/metrics.jsonl")
    losses = [row["loss"] for row in map(json.loads, log.read_text().splitlines()) if row["step"] > SKIPPED_STEPS]
    shutil.rmtree(store / file.stem)
    return _run(began, steps, losses, _tokens_per_row(asked.chats, model, int(metrics["packed_rows"])))


def _trl(place: Path, model: Path, asked: argparse.Namespace, number: int, keys: dict[str, int | bool]) -> Run:
    """Train by TRL's own script, and take the times at which it prints its steps."""
    only = place / "messages.parquet"
    if not only.exists():
        datasets.Dataset.from_parquet(str(asked.chats)).select_columns(["messages"]).to_parquet(str(only))
    config = {
        "model_name_or_path": str(model), "datasets": [{"path": "parquet", "data_files": str(only)}],
        "output_dir": str(place / f"trl{number}"), "assistant_only_loss": True, "max_steps": asked.steps,
        "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "report_to": "none",
        **TRAINER, **keys,
    }  # fmt: skip
    file = place / f"trl{number}.yaml"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "trl.scripts.sft", "--config", str(file)]
    began = time.time()
    steps: list[tuple[int, float]] = []
    losses: list[float] = []
    for line in Process(command, place, ROOT).lines():
        if line.startswith("{'loss'"):
            steps.append((len(steps) + 1, time.time()))
            losses.append(float(line.split("'loss': ")[1].split(",")[0].strip("'")))
    rows = None if keys is PACKED else len(datasets.Dataset.from_parquet(str(only)))
    return _run(began, steps, losses[SKIPPED_STEPS:], _tokens_per_row(asked.chats, model, rows))


def _run(began: float, steps: list[tuple[int, float]], losses: list[float], tokens_per_row: float) -> Run:
    """What the times of the steps say; a stage reports at most one step a second."""
    measured = [(step, at) for step, at in steps if step >= SKIPPED_STEPS]
    (first, start), (last, end) = measured[0], measured[-1]
    speed = (last - first) * ROWS * tokens_per_row / (end - start)
    return Run(steps[0][1] - began, speed, statistics.mean(losses))


def _tokens_per_row(chats: Path, model: Path, count: int | None) -> float:
    """Tokens without padding in a row, on average; without a count of rows, they are packed as full as they can be."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    rows = datasets.Dataset.from_parquet(str(chats))["messages"]
    encoded = tokenizer.apply_chat_template(list(rows), tokenize=True, return_dict=True)["input_ids"]
    tokens = sum(map(len, encoded))
    return tokens / (count or -(-tokens // LENGTH))


if __name__ == "__main__":
    main()
