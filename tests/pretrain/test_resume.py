import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cordee.compute import resume, shards
from pretrain.training import checkpoint, loop

ROOT = Path(__file__).resolve().parents[2]
SHARD = "shard-0-of-1.safetensors"
KEYS = {"max_steps": 9, "save_steps": [3, 6], "eval_steps": 3, "resume_steps": 2}


class Killed(BaseException):
    """Ends a run where it stands, as a kill does: nothing catches it."""


def files_of(out):
    """What a run leaves, but for what the clock says."""
    contents = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    contents[Path("metrics.jsonl")] = [
        {name: value for name, value in json.loads(line).items() if name != "tokens_per_s"}
        for line in contents[Path("metrics.jsonl")].splitlines()
    ]
    contents[Path("training.json")] = {
        name: value for name, value in json.loads(contents[Path("training.json")]).items() if "_per_s" not in name
    }
    return contents


def notes(folder):
    return [
        event["text"]
        for event in map(json.loads, (folder / "events.jsonl").read_text().splitlines())
        if "text" in event
    ]


def start(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain.train", "--job", str(folder / "job.json")], env=environment, cwd=ROOT
    )


def test_killed_with_sigkill_and_continued_it_leaves_the_same_files(trained, job):
    whole, _ = trained("whole", **KEYS)
    folder = job("killed", **KEYS)
    for step in (3, 7):  # twice: the second kill hits a run that went on itself
        process = start(folder)
        metrics, point = folder / "out" / "metrics.jsonl", folder / "out" / "resume" / f"{step - 1}"
        while not (point.exists() and f'"step": {step}' in metrics.read_text()):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "out" / "training.json").exists()
    assert start(folder).wait() == 0
    events = list(map(json.loads, (folder / "events.jsonl").read_text().splitlines()))
    assert [event["step"] for event in events if event["event"] == "resumed"][-1] >= 6
    assert files_of(folder / "out") == files_of(whole)


PLACES = [
    *[(shards.Memory, "fill", call) for call in (1, 3)],
    *[(shards.Memory, "write", call) for call in (1, 3)],
    *[(checkpoint, "save_model", call) for call in (1, 2, 3)],
    *[(loop, "measure_heldout", call) for call in (2, 3)],
    (resume.files, "write_json", 2),
    (resume.files, "sync_folder", 5),
    (resume.shutil, "rmtree", 3),
    (loop, "_log", 5),
    (resume.Saver, "save", 2),
]


@pytest.mark.parametrize(("module", "name", "call"), PLACES, ids=[f"{name}-{call}" for _, name, call in PLACES])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_wherever_it_dies_the_next_run_leaves_the_same_files(trained, monkeypatch, module, name, call, after):
    whole, _ = trained("whole", **KEYS)
    calls, real = [], getattr(module, name)

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        result = real(*arguments, **options)
        if len(calls) == call:
            raise Killed
        return result

    monkeypatch.setattr(module, name, dies)
    with pytest.raises(Killed):
        trained("a", **KEYS)
    monkeypatch.setattr(module, name, real)
    out, _ = trained("a", **KEYS)
    assert files_of(out) == files_of(whole)


def stopped_at_five(trained, monkeypatch):
    """A training that died after step 5, with resume points at 2 and 4."""
    real = loop._log

    def dies(training, state, grad_norm):
        real(training, state, grad_norm)
        if state.step == 5:
            raise Killed

    monkeypatch.setattr(loop, "_log", dies)
    with pytest.raises(Killed):
        trained("a", **KEYS)
    monkeypatch.setattr(loop, "_log", real)


@pytest.mark.parametrize("name", [SHARD, "state.json"])
def test_a_damaged_state_is_noticed_and_the_one_before_it_is_used(trained, monkeypatch, tmp_path, name):
    whole, _ = trained("whole", **KEYS)
    stopped_at_five(trained, monkeypatch)
    file = tmp_path / "a" / "out" / "resume" / "4" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    out, _ = trained("a", **KEYS)
    said = notes(tmp_path / "a")
    assert any(note.startswith("the state at step 4 is damaged") for note in said)
    assert "goes on from step 2" in said
    assert files_of(out) == files_of(whole)


def test_the_state_holds_weights_and_moments_and_nothing_pickled_and_two_are_kept(trained, monkeypatch, tmp_path):
    stopped_at_five(trained, monkeypatch)
    folder = tmp_path / "a" / "out" / "resume"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        f"{step}/{name}" for step in (2, 4) for name in (SHARD, "state.json")
    }
    held = load_file(folder / "4" / SHARD)
    assert {name.rpartition("/")[2] for name in held if "/" in name} == {"exp_avg", "exp_avg_sq", "step"}
    assert float(held["model.lm_head.weight/step"]) == 4.0


def test_dropout_does_not_break_the_same_bits(trained, monkeypatch, tmp_path):
    model = (ROOT / "configs/models/apertus-micro.yaml").read_text() + "attention_dropout: 0.1\n"
    (tmp_path / "dropout.yaml").write_text(model)
    keys = {**KEYS, "model": str(tmp_path / "dropout.yaml")}
    whole, _ = trained("whole", **keys)
    plain, _ = trained("plain", **KEYS)
    assert (whole / "model.safetensors").read_bytes() != (plain / "model.safetensors").read_bytes()
    monkeypatch.setitem(KEYS, "model", keys["model"])
    stopped_at_five(trained, monkeypatch)
    out, _ = trained("a", **keys)
    assert files_of(out) == files_of(whole)


def test_the_state_of_every_optimizer_is_continued_to_the_same_bits(trained, monkeypatch, tmp_path):
    others = {"optimizer": "ademamix", "loss": "goldfish", "goldfish_k": 2, "goldfish_h": 3, "schedule": "cosine"}
    for name, value in {**others, "decay_steps": 0}.items():
        monkeypatch.setitem(KEYS, name, value)
    whole, _ = trained("whole", **KEYS)
    stopped_at_five(trained, monkeypatch)
    held = load_file(tmp_path / "a" / "out" / "resume" / "4" / SHARD)
    moments = {name.rpartition("/")[2] for name in held if "/" in name}
    assert moments == {"exp_avg", "exp_avg_slow", "exp_avg_sq", "step"}
    out, _ = trained("a", **KEYS)
    assert files_of(out) == files_of(whole)


def test_no_line_before_a_point_can_be_lost_in_a_power_failure(trained, unflushed):
    trained("a")
    assert unflushed == [0, 0, 0]
