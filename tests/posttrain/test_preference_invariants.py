"""How a step is cut into batches, shared by processes and computed changes nothing, for every preference loss."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from preference_samples import METHODS, keys_of, stage_of, write_rows
from safetensors.torch import load_file

from cordee import files
from cordee.stage import Context

Trained = tuple[dict[str, torch.Tensor], list[dict[str, float]]]
ROOT = Path(__file__).parents[2]
FSDP = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
VARIANTS: dict[str, dict[str, Any]] = {
    "one by one": {"per_device_train_batch_size": 1},
    "two batches": {"per_device_train_batch_size": 4},
    "two processes": {"per_device_train_batch_size": 2, "launch": {"num_processes": 2}},
    "checkpointed": {"per_device_train_batch_size": 8, "trainer": {"gradient_checkpointing": True}},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def figures(out: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name != "grad_norm"}
        for row in files.read_json_lines(out / "metrics.jsonl")
    ]


def compare(one: Trained, other: Trained) -> None:
    """Two trainings are the same up to rounding, which has no direction."""
    for row, same in zip(one[1], other[1], strict=True):
        # before the first step rewards are rounding errors, and which is larger has no meaning
        named = {name for name in row if row["step"] > 1 or "accuracies" not in name}
        assert row.keys() == same.keys()
        assert {name: same[name] for name in named} == pytest.approx(
            {name: row[name] for name in named}, rel=1e-3, abs=2e-4
        )
    moved = torch.cat([(other[0][name] - value).flatten() for name, value in one[0].items()])
    assert float(moved.abs().max()) < 1e-4
    # A drift in one direction shows in the mean long before it does in any single weight.
    assert abs(float(moved.mean())) <= 5 * float(moved.std()) / len(moved) ** 0.5 + 1e-9


def within(stage: Any, keys: dict[str, Any], context: Context) -> Trained:
    stage.run(stage.Config.model_validate(keys), context)
    return load_file(context.out / "model.safetensors"), figures(context.out)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_however_it_is_cut(
    model_folder: Path, rows: Path, new_context: Callable[[str], Context], method: str
) -> None:
    given = {"deterministic": False, "heldout": 0.25}
    found = []
    for at_once in (8, 1):
        keys = keys_of(method, model_folder, rows, per_device_train_batch_size=at_once, **given)
        found.append(within(stage_of(method), keys, new_context(str(at_once))))
    compare(*found)
    before = load_file(model_folder / "model.safetensors")
    assert max(float((found[0][0][name] - value).abs().max()) for name, value in before.items()) > 1e-3


def start(stage: str, keys: dict[str, Any], work: Path) -> "subprocess.Popen[bytes]":
    """Begin a training as the launcher does."""
    (work / "out").mkdir(parents=True, exist_ok=True)
    job = {"config": keys, "out": str(work / "out"), "seed": 3, "events": str(work / "run" / "events.jsonl")}
    (work / "run").mkdir(exist_ok=True)
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    asked = {"num_processes": 1, "config_file": None} | keys.get("launch", {})
    processes, launch = asked["num_processes"], []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    if asked["config_file"]:
        given = ["--config_file", asked["config_file"], "--num_processes", str(processes), "--main_process_port", "0"]
        launch = ["-m", "accelerate.commands.launch", *given, str(ROOT / "tests" / "stages" / "fsdp_on_cpu.py")]
        environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
    elif processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    module = [f"posttrain.{stage}"] if asked["config_file"] else ["-m", f"posttrain.{stage}"]
    with (work / "log.txt").open("ab") as log:
        command = [sys.executable, *launch, *module, "--job", str(work / "job.json")]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def trained(method: str, keys: dict[str, Any], work: Path) -> Trained:
    process = start(method.partition(" ")[0], keys, work)
    assert process.wait() == 0, (work / "log.txt").read_text()[-3000:]
    return load_file(work / "out" / "model.safetensors"), figures(work / "out")


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need a GPU each")
@pytest.mark.parametrize("method", METHODS)
def test_batches_processes_and_checkpointing_change_no_training(
    model_folder: Path, rows: Path, tmp_path: Path, method: str
) -> None:
    def of(name: str, **given: Any) -> Trained:
        keys = keys_of(method, model_folder, rows, deterministic=False, heldout=0.25, **given)
        return trained(method, keys, tmp_path / name.replace(" ", "-"))

    whole = of("whole", per_device_train_batch_size=8)
    for name, given in VARIANTS.items():
        compare(whole, of(name, **given))


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need a GPU each")
@pytest.mark.parametrize("method", ["dpo aot", "kto"])
def test_two_processes_measure_a_step_together(model_folder: Path, rows: Path, tmp_path: Path, method: str) -> None:
    keys = keys_of(method, model_folder, rows, deterministic=False)
    alone = trained(method, keys | {"per_device_train_batch_size": 8}, tmp_path / "alone")
    compare(alone, trained(method, keys | VARIANTS["two processes"], tmp_path / "together"))


def sharded_on(folder: Path) -> dict[str, Any]:
    """A stage's `launch` for two processes that share the model's weights on the CPU."""
    settings = yaml.safe_load(FSDP.read_text()) | {"num_processes": 2}
    del settings["use_cpu"]  # accelerate would start one process
    (folder / "fsdp2.yaml").write_text(yaml.safe_dump(settings))
    return {"num_processes": 2, "config_file": str(folder / "fsdp2.yaml")}


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch then shards over GPUs")
@pytest.mark.parametrize("processes", [2, 1])
def test_a_sharded_training_that_was_stopped_goes_on_in_any_number_of_processes(
    model_folder: Path, rows: Path, tmp_path: Path, processes: int
) -> None:
    keys = keys_of("orpo", model_folder, rows, deterministic=False, heldout=0.25)
    alone = trained("orpo", keys | {"per_device_train_batch_size": 8}, tmp_path / "alone")
    work, sharded = tmp_path / "stopped", {"per_device_train_batch_size": 2, "launch": sharded_on(tmp_path)}
    (work / "run").mkdir(parents=True)
    (work / "run" / "stop").touch()
    start("orpo", keys | sharded, work).wait()
    assert "stopped at step 1" in (work / "log.txt").read_text()
    written = {path.name for path in (work / "out" / "resume" / "1").iterdir()}
    assert written == {"shard-0-of-2.safetensors", "shard-1-of-2.safetensors", "state.json"}
    (work / "run" / "stop").unlink()
    compare(alone, trained("orpo", keys | (sharded if processes == 2 else {}), work))


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch then shards over GPUs")
@pytest.mark.parametrize("method", ["dpo", "dpo aot", "kto", "orpo"])
def test_a_sharded_model_is_trained_as_one_in_a_piece(
    model_folder: Path, rows: Path, tmp_path: Path, method: str
) -> None:
    launch = sharded_on(tmp_path)
    keys = keys_of(method, model_folder, rows, deterministic=False, heldout=0.25)
    alone = trained(method, keys | {"per_device_train_batch_size": 8}, tmp_path / "alone")
    workers = keys["trainer"] | {"dataloader_num_workers": 1}  # which have the collator as it is once they start
    sharded = keys | {"per_device_train_batch_size": 2, "launch": launch, "trainer": workers}
    compare(alone, trained(method, sharded, tmp_path / "sharded"))
    for work in ("alone", "sharded"):
        said = (tmp_path / work / "run" / "events.jsonl").read_text()
        if method != "kto":  # a sharded model is looked at once it is on its device: when the training begins
            looked = said.index("prompt is computed once for both answers")
            assert (looked > said.index("parameters to train")) == (work == "sharded")


@pytest.mark.parametrize(
    "method", ["kto", *(pytest.param(name, marks=pytest.mark.long) for name in ("dpo aot", "orpo", "cpo", "qrpo"))]
)
def test_killed_and_continued_it_ends_in_the_same_bits(
    model_folder: Path, rows: Path, tmp_path: Path, method: str
) -> None:
    stage = method.partition(" ")[0]
    more = {"resume_steps": 2, "save_steps": [2], "heldout": 0.25, "per_device_train_batch_size": 4}
    trainer = {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 1e-3}
    keys = keys_of(method, model_folder, rows, trainer=trainer, **more)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(stage, keys, whole).wait() == 0, (whole / "log.txt").read_text()[-3000:]
    process = start(stage, keys, killed)
    mark = killed / "out" / "resume" / "2" / "state.json"
    deadline = time.monotonic() + 600
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(stage, keys, killed).wait() == 0, (killed / "log.txt").read_text()[-3000:]
    one, other = (
        {str(path.relative_to(work)): files.sha256(path) for path in files.walk(work / "out")}
        for work in (whole, killed)
    )
    assert one == other
