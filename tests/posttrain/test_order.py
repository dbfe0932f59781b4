"""Which rows a step has depends on the seed, and on nothing that only says how to execute."""

import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from architectures import make
from chat_samples import some_chats, write_parquet
from safetensors.torch import load_file

from posttrain.training.order import ByLength, Order, steps


def test_every_row_is_seen_once_an_epoch_and_steps_are_whole():
    seen = list(Order(10, 24, seed=3, is_shuffled=True))
    assert [sorted(seen[start : start + 10]) for start in (0, 10)] == [list(range(10))] * 2
    assert len(seen) == 24
    assert len(set(seen[20:])) == 4
    assert seen[:10] != seen[10:20] != list(range(10))


def test_a_seed_gives_one_order_and_the_data_its_own():
    assert list(Order(10, 24, 3, is_shuffled=True)) == list(Order(10, 24, 3, is_shuffled=True))
    assert list(Order(10, 24, 3, is_shuffled=True)) != list(Order(10, 24, 5, is_shuffled=True))
    assert list(Order(3, 7, 3, is_shuffled=False)) == [0, 1, 2, 0, 1, 2, 0]


def test_the_rows_of_a_step_are_sorted_by_length_and_stay_its_rows():
    lengths = np.array([5, 9, 1, 7, 3, 8, 2, 6, 4, 10])
    plain = list(Order(10, 24, 3, is_shuffled=True))
    by_length = list(Order(10, 24, 3, is_shuffled=True, by_length=ByLength(lengths, 4)))
    assert by_length != plain
    for start in range(0, 24, 4):
        step = by_length[start : start + 4]
        assert sorted(step) == sorted(plain[start : start + 4])
        assert list(lengths[step]) == sorted(lengths[step], reverse=True)


@pytest.mark.parametrize(
    ("rows", "epochs", "batch", "expected"),
    [(10, 1, 4, 3), (10, 2, 4, 5), (20, 3, 32, 2), (1000, 0.1, 10, 10), (3, 1, 1, 3)],
)
def test_steps_see_the_rows_as_often_as_asked(rows, epochs, batch, expected):
    assert steps(rows, epochs, batch) == expected


def trained(folder, model_folder, data, at_once, processes=1):
    """The weights after 1.5 epochs over 10 rows in steps of 4, what the steps counted, and their figures."""
    config = {
        "model": str(model_folder), "data": [{"path": str(data)}], "global_batch_size": 4,
        "per_device_train_batch_size": at_once, "deterministic": False, "launch": {"num_processes": processes},
        "trainer": {"max_length": 128, "num_train_epochs": 1.5, "learning_rate": 0.1, "optim": "sgd"},
    }  # fmt: skip
    for name in ("out", "run"):
        (folder / name).mkdir(parents=True)
    job = {"config": config, "out": str(folder / "out"), "seed": 17, "events": str(folder / "run" / "events.jsonl")}
    (folder / "job.json").write_text(json.dumps(job))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "-m", "posttrain.sft", "--job", str(folder / "job.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    counted = [(row["step"], row["tokens"], row["epoch"]) for row in lines]
    figures = [row[name] for row in lines for name in ("loss", "entropy", "mean_token_accuracy")]
    return load_file(folder / "out" / "model.safetensors"), counted, figures


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need a GPU each")
def test_batches_and_processes_change_no_step(model_folder, tmp_path):
    data = write_parquet(tmp_path / "messages.parquet", some_chats(10))
    weights, counted, figures = trained(tmp_path / "whole", model_folder, data, 4)
    assert [(step, epoch) for step, _, epoch in counted] == [(1, 0.4), (2, 0.8), (3, 1.2), (4, 1.6)]
    for name, at_once, processes in (("rows", 1, 1), ("processes", 2, 2)):
        others, others_counted, others_figures = trained(tmp_path / name, model_folder, data, at_once, processes)
        assert others_counted == counted
        assert others_figures == pytest.approx(figures, abs=1e-3)
        moved = Counter({key: float((others[key] - value).abs().max()) for key, value in weights.items()})
        assert max(moved.values()) < 1e-4, moved.most_common(3)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need a GPU each")
def test_several_processes_train_a_model_with_parts_that_get_no_gradient(tmp_path):
    data = write_parquet(tmp_path / "messages.parquet", some_chats(10))
    _, counted, _ = trained(tmp_path / "nested", make(tmp_path / "model", "gemma3_nested"), data, 2, 2)
    assert [step for step, _, _ in counted] == [1, 2, 3, 4]
