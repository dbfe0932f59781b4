"""What fails in a pretraining of two processes: noticed, named, and restarted to the same bits."""

import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from token_files import training, write_tokens
from watched import ends, reaches, start, wait_for

from cordee import lock
from cordee.artifact import Store


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A training by two processes that nothing disturbed: its folder, and the digest of its weights."""
    folder = tmp_path_factory.mktemp("two")
    write_tokens(folder / "tokens", np.random.default_rng(1).integers(4, 60, 150).tolist())
    asked = {"max_steps": 240, "global_batch_size": 4, "resume_steps": 20, "launch": {"num_processes": 2}}
    base = {"uses": "pretrain.train", **training(Path("tokens"), **asked)}
    (folder / "two.yaml").write_text(json.dumps({"name": "two", "stages": {"base": base}}))
    run = start(folder, recipe="two.yaml")
    said, _ = run.communicate(timeout=900)
    assert run.returncode == 0, said
    return folder, _weights(folder)


def _weights(folder):
    return hashlib.sha256((folder / "runs/two/base@1/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def two(undisturbed, tmp_path):
    """The same training in a folder of its own: started, and its logs."""
    (tmp_path / "tokens").symlink_to(undisturbed[0] / "tokens")
    (tmp_path / "two.yaml").write_text((undisturbed[0] / "two.yaml").read_text())
    return start(tmp_path, recipe="two.yaml"), tmp_path / "runs/two/logs/base@1"


def _same(run, folder, undisturbed):
    said, _ = run.communicate(timeout=900)
    assert run.returncode == 0, said
    assert _weights(folder) == undisturbed[1]
    (made,) = Store(folder / "runs").scan("two")
    return made.manifest.goodput


@pytest.mark.long
def test_a_rank_that_is_killed_is_seen_within_three_seconds_and_the_bits_are_the_same(two, tmp_path, undisturbed):
    run, logs = two
    pid = reaches(logs, 50, rank=1)["pid"]
    began = time.time()
    os.kill(pid, signal.SIGKILL)
    (end,) = wait_for(lambda: ends(logs), seconds=60)
    spent = _same(run, tmp_path, undisturbed)
    assert end["time"] - began < 3
    (incident,) = spent.incidents
    assert incident.kind == "killed"
    assert re.search("ended by SIGKILL from outside|is gone, in phase", incident.text)
    assert re.match(r"rank 1 \(process \d+\)", incident.text)


@pytest.mark.long
@pytest.mark.parametrize("who", ["ranks", "launcher"])
def test_all_ranks_or_their_launcher_are_killed_and_the_bits_are_the_same(two, tmp_path, undisturbed, who):
    run, logs = two
    ranks = [reaches(logs, 50, rank)["pid"] for rank in (0, 1)]
    parent = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in ranks if who == "ranks" else [parent]:
        os.kill(pid, signal.SIGKILL)
    spent = _same(run, tmp_path, undisturbed)
    assert [one.kind for one in spent.incidents] == ["killed"]
    assert not any(lock.owner(pid)["started"] for pid in ranks)


@pytest.mark.long
def test_a_rank_that_is_stopped_is_named_and_the_bits_are_the_same(two, tmp_path, undisturbed):
    run, logs = two
    told = reaches(logs, 50, rank=1)
    os.kill(told["pid"], signal.SIGSTOP)
    spent = _same(run, tmp_path, undisturbed)
    hang, _ = ends(logs)
    assert re.match(r"rank 1 \(process \d+ on .*\) is (stopped|silent)", hang["text"])
    assert hang["silent_s"] < 10 + 3
    log = (logs / "log.txt").read_text()
    assert {int(rank) for rank in re.findall(r"stacks of rank (\d)", log)} == {0, 1}
    assert log.count("most recent call first") >= 2
    assert [one.kind for one in spent.incidents] == ["hang"]


@pytest.mark.long
def test_a_training_that_diverges_is_not_restarted(undisturbed, cordee):
    keys = ("base.learning_rate=1e30", "base.launch.num_processes=1", "base.max_steps=20")
    done = cordee("run", "two.yaml", *keys, "--runs", "diverged", cwd=undisturbed[0], timeout=600)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert re.search(r"step \d+: the loss is .* and the gradient's norm (nan|inf); lower learning_rate", done.stderr)
    assert [end["cause"] for end in ends(undisturbed[0] / "diverged/two/logs/base@1")] == ["diverged"]


@pytest.mark.long
def test_a_colleagues_resume_point_of_two_processes_is_used(two, tmp_path, undisturbed):
    run, logs = two
    reaches(logs, 45)
    (logs / "save").touch()
    wait_for(lambda: not (logs / "save").exists())
    points = [
        int(path.name) for path in (tmp_path / "runs/two/base@1.partial/resume").glob("*") if path.name.isdecimal()
    ]
    assert any(step % 20 for step in points), points
    _same(run, tmp_path, undisturbed)
