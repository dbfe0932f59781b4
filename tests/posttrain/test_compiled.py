"""Compiled trainings: killed and continued in processes of their own, they end in the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_samples import some_chats, write_parquet
from transformers import ApertusConfig, ApertusForCausalLM, AutoTokenizer

from cordee import files

KEYS = {"global_batch_size": 4, "per_device_train_batch_size": 4, "save_steps": [2], "resume_steps": 2, "compile": "on"}
TRAINER = {"max_steps": 5, "max_length": 128, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def tiny(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, which compiles fast, with the tokenizer of the others."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.save_pretrained(folder)
    config = ApertusConfig.from_pretrained(model_folder, num_hidden_layers=1)
    ApertusForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Chats and pairs of many lengths."""
    folder = tmp_path_factory.mktemp("data")
    chats = some_chats(41)
    pairs = [
        {"prompt": chat[:-1], "chosen": chat[-1:], "rejected": [{"role": "assistant", "content": "no " * (1 + at % 9)}]}
        for at, chat in enumerate(chats)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return {"sft": write_parquet(folder / "chats.parquet", chats), "dpo": folder / "pairs.jsonl"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled code that these tests share."""
    return tmp_path_factory.mktemp("inductor")


def start(stage: str, keys: dict[str, Any], work: Path, cache: Path) -> "subprocess.Popen[bytes]":
    (work / "out").mkdir(parents=True, exist_ok=True)
    job = {"config": keys, "out": str(work / "out"), "seed": 17, "events": str(work / "events.jsonl")}
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    with (work / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", f"posttrain.{stage}", "--job", str(work / "job.json")]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.sha256(path) for path in files.walk(folder)}


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "more", "trainer"),
    [("sft", {}, {"packing": True}), ("dpo", {"lora": {"r": 4}}, {"beta": 0.5})],
)
def test_killed_and_continued_it_ends_in_the_same_bits(
    tiny: Path, data: dict[str, Path], tmp_path: Path, cache: Path, stage: str, more: Any, trainer: Any
) -> None:
    keys = {**KEYS, **more, "model": str(tiny), "data": [{"path": str(data[stage])}], "trainer": {**TRAINER, **trainer}}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(stage, keys, whole, cache).wait() == 0, (whole / "log.txt").read_text()[-2000:]
    process = start(stage, keys, killed, cache)
    mark = killed / "out" / "resume" / "2" / "state.json"
    deadline = time.monotonic() + 600
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (killed / "log.txt").read_text()[-2000:]
    assert start(stage, keys, killed, cache).wait() == 0, (killed / "log.txt").read_text()[-2000:]
    notes = [row.get("text", "") for row in files.read_json_lines(killed / "events.jsonl")]
    assert "goes on from step 2" in notes
    assert notes.count("compiled: as asked") == 2
    assert content(killed / "out") == content(whole / "out")
    assert files.read_json(whole / "out" / "training.json")["compiled"]
