"""Speed and memory of DPO: compiled, not compiled, TRL's own script as documented and with its reference precomputed.

    python benchmarks/dpo.py runs/quickstart/base@1 runs/quickstart/chats@1/preferences.parquet

All arms train the same new adapter on the same pairs, each in a process of its own, in the order A B C D D C B A.
Speed is pairs per second from the first step on that is past compiling, the pass of the reference included: it is what
one epoch over the pairs takes, without the start. Memory is the largest resident set of the arm's processes.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets
from processes import Process, step_s

ROOT = Path(__file__).resolve().parents[1]
ROWS = 16
"""Pairs of a step."""
SKIPPED_STEPS = 4
"""Steps at the beginning whose time does not count."""
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TRAINER = {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "beta": 0.1, "max_length": 512}
PEERS: dict[str, dict[str, bool]] = {
    "TRL's script": {},
    "TRL, precomputed": {"precompute_ref_log_probs": True},
}
"""What TRL's arms have beside its defaults."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training, measured."""

    pairs_per_s: float
    """Of the training steps alone."""
    epoch_per_s: float
    """Pairs per second with the reference's pass."""
    loss: float
    """Of the last step."""
    peak_bytes: int


def main() -> None:
    """Run each arm twice and print its figures and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("pairs", type=Path, help="a parquet or JSON lines file with `prompt`, `chosen` and `rejected`")
    parser.add_argument("--steps", type=int, default=40, help=f"optimizer steps, of {ROWS} pairs")
    parser.add_argument("--batch", type=int, default=ROWS, help="pairs of a forward pass, in every arm")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 in every arm; without it float32")
    parser.add_argument("--once", action="store_true", help="each arm once")
    asked = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        place = Path(folder)
        pairs = _pairs(asked, place)
        arms = ["compiled", "not compiled", "TRL's script", "TRL, precomputed"]
        runs: dict[str, list[Run]] = {name: [] for name in arms}
        for number, name in enumerate(arms if asked.once else [*arms, *reversed(arms)]):
            own = place / str(number)  # TRL keeps the reference's log-probabilities in its cache
            own.mkdir()
            run = (_trl if name in PEERS else _cordee)(asked, own, pairs, name, number)
            runs[name].append(run)
            print(f"{name:17} {run.pairs_per_s:6.2f} pairs/s, {run.epoch_per_s:6.2f} with the reference; "
                  f"{run.peak_bytes / 1e9:.2f} GB; last loss {run.loss:.4f}", flush=True)  # fmt: skip
    _summary(runs)


def _summary(runs: dict[str, list[Run]]) -> None:
    for unit in ("pairs_per_s", "epoch_per_s", "peak_bytes"):
        means = {name: statistics.mean(getattr(run, unit) for run in own) for name, own in runs.items()}
        for ours in ("compiled", "not compiled"):
            told = ", ".join(f"{means[ours] / means[theirs]:.2f} times {theirs}" for theirs in PEERS)
            print(f"{unit:12} {ours:13} {told}")


def _pairs(asked: argparse.Namespace, place: Path) -> Path:
    """As many pairs as are trained on, each once."""
    kind = "parquet" if asked.pairs.suffix == ".parquet" else "json"
    rows = datasets.load_dataset(kind, data_files=str(asked.pairs), split="train", cache_dir=str(place / "hf"))
    file = place / "pairs.jsonl"
    wanted = rows.select_columns(["prompt", "chosen", "rejected"]).shuffle(seed=1).select(range(asked.steps * ROWS))
    wanted.to_json(str(file))
    return file


def _cordee(asked: argparse.Namespace, place: Path, pairs: Path, name: str, number: int) -> Run:
    """Train by the stage, and read the steps' times from its events."""
    config = {
        "model": str(asked.model.resolve()), "data": [{"path": str(pairs)}], "lora": LORA, "logging_steps": 1,
        "compile": "on" if name == "compiled" else "off", "precision": "bfloat16" if asked.bf16 else "float32",
        "global_batch_size": ROWS, "per_device_train_batch_size": asked.batch,
        "trainer": TRAINER | {"num_train_epochs": 1},
    }  # fmt: skip
    file = place / f"run{number}.yaml"
    file.write_text(json.dumps(config))
    store = place / f"runs{number}"
    own = Process([sys.executable, "-m", "posttrain.dpo", "--config", str(file), "--runs", str(store)], place, ROOT)
    for _ in own.lines():
        pass
    (log,) = store.glob(f"run{number}/logs/*/events.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    (manifest,) = store.glob(f"run{number}/*@1/manifest.json")
    loss = json.loads(manifest.read_text())["metrics"]["loss"]
    scored = [row["time"] for row in rows if row.get("unit") == "answers scored by the reference"]
    began = next(row["time"] for row in rows if "prompt is computed" in row.get("text", ""))
    reference_s = scored[-1] - began if scored else 0.0
    return _run(asked, step_s(rows, SKIPPED_STEPS), reference_s, loss, own)


def _trl(asked: argparse.Namespace, place: Path, pairs: Path, name: str, number: int) -> Run:
    """Train by TRL's own script, and take the times at which it prints its steps."""
    config = {
        "model_name_or_path": str(asked.model.resolve()), "output_dir": str(place / f"trl{number}"),
        "datasets": [{"path": "json", "data_files": str(pairs)}], "use_peft": True, "lora_r": LORA["r"],
        "lora_alpha": LORA["lora_alpha"], "lora_target_modules": LORA["target_modules"], "bf16": asked.bf16,
        "per_device_train_batch_size": asked.batch, "gradient_accumulation_steps": ROWS // asked.batch,
        "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "report_to": "none",
        "gradient_checkpointing": False, "num_train_epochs": 1, **TRAINER, **PEERS[name],
    }  # fmt: skip
    file = place / f"trl{number}.yaml"
    file.write_text(json.dumps(config))
    own = Process([sys.executable, "-m", "trl.scripts.dpo", "--config", str(file)], place, ROOT)
    times, loss = [], 0.0
    for line in own.lines():
        if "'loss'" in line:
            times.append(time.time())
            loss = float(line.split("'loss': ")[1].split(",")[0].strip("'"))
    each_s = (times[-1] - times[SKIPPED_STEPS - 1]) / (len(times) - SKIPPED_STEPS)
    reference_s = _reference_s(own.log.read_text()) if PEERS[name] else 0.0
    return _run(asked, each_s, reference_s, loss, own)


def _reference_s(log: str) -> float:
    """Seconds of the reference's pass, from its progress bar's last line: `… [00:12<00:00, …]`."""
    parts = log.replace("\r", "\n").split("\n")
    line = [part for part in parts if "Computing reference log probs" in part and "<" in part][-1]
    minutes, _, seconds = line.split("[")[1].split("<")[0].rpartition(":")
    return 60 * float(minutes or 0) + float(seconds)


def _run(asked: argparse.Namespace, each_s: float, reference_s: float, loss: float, own: Process) -> Run:
    pairs = asked.steps * ROWS
    return Run(ROWS / each_s, pairs / (each_s * asked.steps + reference_s), loss, own.peak_bytes)


if __name__ == "__main__":
    main()
