"""FSDP2 through the real stage: its shards train, stop, go on and publish as one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cordee.compute import resume

ROOT = Path(__file__).resolve().parents[2]
FSDP = ROOT / "configs/accelerate/fsdp2.yaml"
KEYS = {"max_steps": 4, "resume_steps": 2, "global_batch_size": 8, "save_steps": [2]}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch then shards over GPUs")


@pytest.fixture
def sharded(job, tmp_path):
    """Trains in shards: `out, ended = sharded("a", 2, max_steps=3)`; called again it goes on."""

    def call(name, processes, **keys):
        settings = tmp_path / f"fsdp-{processes}.yaml"
        told = yaml.safe_load(FSDP.read_text()) | {"num_processes": processes}
        del told["use_cpu"]  # accelerate would start one process
        settings.write_text(yaml.safe_dump(told))
        launch = {"num_processes": processes, "config_file": str(settings)}
        folder = job(name, launch=launch, **KEYS | keys)
        command = ["-m", "accelerate.commands.launch", "--config_file", str(settings), "--main_process_port", "0"]
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        module = [str(ROOT / "tests/stages/fsdp_on_cpu.py"), "pretrain.train", "--job", str(folder / "job.json")]
        ended = subprocess.run(
            [sys.executable, *command, *module],
            env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        return folder / "out", ended

    return call


def rows(out, key):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in found if key in row}


def require_same_training(one, other):
    assert rows(one, "samples") == rows(other, "samples")
    for key, within in (("loss", 1e-5), ("grad_norm", 1e-4), ("heldout_bits_per_byte", 1e-4)):
        assert list(rows(other, key).values()) == pytest.approx(list(rows(one, key).values()), rel=within), key
    begun, first, second = (load_file(path / "model.safetensors") for path in (one / "checkpoints/2", one, other))
    moved = sum(float((first[name] - begun[name]).norm() ** 2) for name in first) ** 0.5
    apart = sum(float((first[name] - second[name]).norm() ** 2) for name in first) ** 0.5
    assert apart < 0.01 * moved


@pytest.mark.parametrize("processes", [2, 4])
def test_shards_train_the_model_that_one_process_trains(trained, sharded, processes):
    one, _ = trained("one", **KEYS)
    out, ended = sharded("shards", processes, per_device_train_batch_size=1)
    assert ended.returncode == 0, ended.stderr
    require_same_training(one, out)
    assert not (out / "resume").exists()


def require_same_bits(one, other):
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    assert all(float((first[name] - second[name]).abs().max()) < 1e-28 for name in first)


STILL = {"max_steps": 1, "save_steps": [], "warmup_steps": 0, "decay_steps": 0, "learning_rate": 1e-30}
"""A step that moves no value but 0."""


def test_shards_begin_with_the_bits_that_one_process_begins_with(trained, sharded):
    """Drawn anew, and read from a folder in slices."""
    one, _ = trained("one", **KEYS | STILL)
    out, ended = sharded("shards", 2, **STILL)
    assert ended.returncode == 0, ended.stderr
    require_same_bits(one, out)
    before, _ = trained("before", **KEYS)
    out, ended = sharded("on", 2, model=str(before), **STILL)
    assert ended.returncode == 0, ended.stderr
    require_same_bits(before, out)
    assert (out / "config.json").read_bytes() == (before / "config.json").read_bytes()


def test_what_two_processes_stopped_four_or_one_go_on_with(trained, sharded, tmp_path):
    one, _ = trained("one", **KEYS)
    for name, processes in (("to-four", 4), ("to-one", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stop").touch()
        out, ended = sharded(name, 2)
        assert ended.returncode != 0
        assert "stopped at step 1 of 4" in ended.stderr
        assert sorted(path.name for path in (out / "resume" / "1").glob("shard-*")) == [
            f"shard-{rank}-of-2.safetensors" for rank in (0, 1)
        ]
        (tmp_path / name / "stop").unlink()
        if processes == 1:
            trained(name, **KEYS)
        else:
            _, ended = sharded(name, processes, per_device_train_batch_size=1)
            assert ended.returncode == 0, ended.stderr
        events = [json.loads(line) for line in (tmp_path / name / "events.jsonl").read_text().splitlines()]
        assert [event["step"] for event in events if event["event"] == "resumed"] == [1]
        require_same_training(one, out)
    assert resume.newest(out / "resume") == (None, [])
