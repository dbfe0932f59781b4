"""Recipes as jobs of a real Slurm of three nodes: what is submitted, what fails, what is killed, and what continues."""

import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from token_files import training, write_tokens

from cordee import events, manifest

CLUSTER = """
kind: slurm
partition: all
processes_per_node: 1
time_limit: "00:10:00"
save_before_s: 30
"""
COUNT = """
name: count
stages:
  one: {uses: toys.counter, to: 300}
  two: {uses: toys.counter, to: 20, after: $one}
"""
SLOWLY = "one.pace_s=0.2"
CHOIR = "name: choir\nstages: {choir: {uses: toys.choir, launch: {num_processes: 2}}}\n"


def digest(to: int) -> str:
    """What counting without a break ends in."""
    found = ""
    for step in range(1, to + 1):
        found = hashlib.sha256(f"{found} {step}".encode()).hexdigest()
    return found


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder that jobs are submitted in; its name has to be quoted in a shell."""
    folder = tmp_path / "it's my work"
    folder.mkdir()
    (folder / "count.yaml").write_text(COUNT)
    (folder / "choir.yaml").write_text(CHOIR)
    (folder / "three.yaml").write_text(CLUSTER)
    (folder / "short.yaml").write_text(CLUSTER.replace("00:10:00", "00:02:00").replace("30", "60"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


@pytest.fixture
def call(cordee, work):
    """The command line, in that folder."""

    def run(*arguments: str, cluster: str = "three.yaml") -> str:
        done = cordee(*arguments, "--cluster", cluster, cwd=work, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def jobs(printed: str) -> dict[str, str]:
    """The jobs that a run has submitted, by their stages."""
    return dict(re.findall(r"^(\w+) +job (\d+)", printed, re.MULTILINE))


def seen(work: Path, logs: str) -> list[dict]:
    """The events of a stage."""
    path = work / "runs" / logs / "events.jsonl"
    return events.read(path) if path.exists() else []


def steps(work: Path, logs: str = "count/logs/one@1") -> int:
    """How far a stage is."""
    return max((event["done"] for event in seen(work, logs) if event["event"] == "progress"), default=0)


def test_a_recipe_is_a_chain_of_jobs_and_what_is_done_is_not_submitted_again(slurm, call, work):
    printed = call("run", "count.yaml")
    found = jobs(printed)
    assert list(found) == ["one", "two"]
    assert f"job {found['two']}, after {found['one']}" in printed
    assert slurm.reaches(found["two"], "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    assert (work / "runs/count/one@1/digest.txt").read_text() == digest(300)
    assert (work / "runs/count/two@1/digest.txt").read_text() == digest(20)
    assert "nothing to submit: all is done" in call("run", "count.yaml")
    assert "published count/one@1" in call("logs", "count.yaml", "one")


def test_a_second_run_joins_the_first_and_status_says_how_far_it_is(slurm, call, work):
    slowly = "one.pace_s=2"
    found = jobs(call("run", "count.yaml", slowly))
    slurm.wait_for(lambda: steps(work) > 5)
    assert "nothing to submit: one, two waits or runs" in call("run", "count.yaml", slowly)
    told = call("status", "count.yaml", slowly)
    assert re.search(rf"one .* running .* job {found['one']}: steps \d+/300", told), told
    assert re.search(rf"two .* waiting .* job {found['two']}: it needs one", told), told
    cancelled = call("cancel", "count.yaml")
    assert set(re.findall(r"job (\d+) is cancelled", cancelled)) == set(found.values())
    slurm.wait_for(lambda: slurm("squeue", "--noheader").strip() == "")
    assert re.search(r"one .* stopped .* stopped at step \d+ of 300", call("status", "count.yaml"))
    again = jobs(call("run", "count.yaml"))
    assert slurm.reaches(again["two"], "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    assert seen(work, "count/logs/one@1")[-1]["event"] != "error"
    assert any(event["event"] == "resumed" for event in seen(work, "count/logs/one@1"))
    assert (work / "runs/count/one@1/digest.txt").read_text() == digest(300)


def test_the_jobs_of_a_sweep_share_what_is_the_same(slurm, call, work):
    printed = call("sweep", "count.yaml", "--over", "two.to=20,30")
    first, second = (jobs(part) for part in printed.split("variant ")[1:])
    assert (list(first), list(second)) == (["one", "two"], ["two"])
    assert f"job {second['two']}, after {first['one']}" in printed
    for found in (first, second):
        assert slurm.reaches(found["two"], "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    made = {(work / f"runs/count/two@{number}/digest.txt").read_text() for number in (1, 2)}
    assert made == {digest(20), digest(30)}
    shown = call("sweep", "count.yaml", "--over", "two.to=20,30", "--metric", "two.counted").splitlines()[-2:]
    assert [line.split() for line in shown] == [["20", "20"], ["30", "30"]]


def test_what_depends_on_a_stage_that_fails_is_cancelled(slurm, call, work):
    (work / "brook.yaml").write_text(
        "name: brook\nstages: {spring: {uses: toys.spring}, pool: {uses: toys.spring, source: $spring/line.txt}}\n"
    )
    found = jobs(call("run", "brook.yaml", "spring.trouble=fault"))
    assert slurm.reaches(found["spring"], "FAILED", "COMPLETED") == "FAILED"
    assert slurm.reaches(found["pool"], "CANCELLED", "COMPLETED") == "CANCELLED"
    told = call("status", "brook.yaml", "spring.trouble=fault")
    assert re.search(r"spring .* failed .* failed, exit code 1; pipe: the pipe burst", told), told
    assert re.search(r"pool .* failed .* cancelled", told), told
    assert "the pipe burst" in call("logs", "brook.yaml", "spring")
    mended = jobs(call("run", "brook.yaml"))
    assert slurm.reaches(mended["pool"], "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"


@pytest.mark.usefixtures("slurm")
def test_a_stage_without_slurm_or_without_the_nodes_is_one_line(cordee, work, monkeypatch):
    refused = cordee("stage", "choir.yaml", "choir", "--cluster", "three.yaml", cwd=work)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "choir needs 2 nodes, and this is no job of Slurm" in refused.stderr
    (work / "other.yaml").write_text(CLUSTER.replace("partition: all", "partition: none"))
    refused = cordee("run", "choir.yaml", "--cluster", "other.yaml", cwd=work)
    assert (refused.returncode, "sbatch: " in refused.stderr, refused.stderr.count("\n")) == (1, True, 1)
    monkeypatch.setenv("PATH", "")
    refused = cordee("run", "choir.yaml", "--cluster", "three.yaml", cwd=work)
    assert refused.returncode == 2
    assert refused.stderr == "cordee: --cluster: Slurm's squeue is not installed here\n"


def test_processes_on_two_nodes_are_one_training_and_one_that_dies_has_all_of_them_restarted(slurm, call, work):
    found = jobs(call("run", "choir.yaml", "choir.trouble=wait"))
    slurm.wait_for(lambda: steps(work, "choir/logs/choir@1") > 3)
    voices = [int(path.read_text()) for path in sorted((work / "runs/choir/choir@1.partial/voices").iterdir())]
    os.kill(voices[1], signal.SIGKILL)
    assert slurm.reaches(found["choir"], "FAILED", "COMPLETED") == "COMPLETED"
    assert not [pid for pid in voices if Path(f"/proc/{pid}").exists()]
    nodes = [path.read_text() for path in sorted((work / "runs/choir/choir@1/nodes").iterdir())]
    assert nodes == ["n1", "n2"]
    assert 10e6 < peak_memory(work / "runs/choir/choir@1") < 10e9


def peak_memory(artifact: Path) -> int:
    return manifest.read(artifact).peak_memory_bytes


def weights(artifact: Path) -> dict[str, str]:
    """The hashes of a model's weights, as its manifest has them."""
    found = {one.path: one.sha256 for one in manifest.read(artifact).files if one.path.endswith(".safetensors")}
    assert found
    return found


@pytest.mark.long
def test_a_training_on_two_nodes_ends_in_the_weights_of_one_node(slurm, call, cordee, work):
    """With as many processes; requeued, it has saved on all nodes, and continues to the same weights."""
    tokens = write_tokens(work / "tokens", [40, 55, 31, 60] * 30)
    # it continues from what it saves when it is asked to end
    keys = training(tokens, max_steps=200, resume_steps=1000, launch={"num_processes": 2})
    base = {"uses": "pretrain.train", **keys}
    (work / "train.yaml").write_text(json.dumps({"name": "train", "seed": 17, "stages": {"base": base}}))
    done = cordee("run", "train.yaml", "--runs", "here", cwd=work, timeout=600)
    assert done.returncode == 0, done.stderr
    found = jobs(call("run", "train.yaml"))
    slurm.wait_for(lambda: steps(work, "train/logs/base@1") >= 10, seconds=600)
    slurm("scontrol", "requeue", found["base"])
    assert slurm.reaches(found["base"], "COMPLETED", "FAILED", seconds=900) == "COMPLETED"
    assert any(event["event"] == "resumed" for event in seen(work, "train/logs/base@1"))
    assert weights(work / "runs/train/base@1") == weights(work / "here/train/base@1")
    assert manifest.read(work / "runs/train/base@1").metrics["num_processes"] == 2


@pytest.mark.long
def test_before_its_time_limit_a_stage_saves_and_its_job_is_requeued_and_ends_in_the_same(slurm, call, work):
    found = jobs(call("run", "count.yaml", "one.pace_s=0.4", cluster="short.yaml"))
    assert slurm.reaches(found["two"], "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=600) == "COMPLETED"
    told = seen(work, "count/logs/one@1")
    assert sum(event["event"] == "resumed" for event in told) >= 1
    assert any("stopped at step" in event.get("text", "") for event in told)
    assert (work / "runs/count/one@1/digest.txt").read_text() == digest(300)


@pytest.mark.long
def test_a_stage_that_keeps_no_state_fails_at_its_time_limit_and_is_not_requeued(slurm, call, work):
    (work / "brook.yaml").write_text("name: brook\nstages: {spring: {uses: toys.spring}}\n")
    found = jobs(call("run", "brook.yaml", "spring.trouble=wait", cluster="short.yaml"))
    assert slurm.reaches(found["spring"], "FAILED", "COMPLETED", "TIMEOUT") == "FAILED"
    assert "its time is over, and it keeps no state to continue from" in call("logs", "brook.yaml", "spring")


def require_continued(slurm, work: Path, last: str) -> None:
    """See that the counter is resumed, that the recipe's last job ends well, and that it counted right."""
    slurm.wait_for(lambda: any(event["event"] == "resumed" for event in seen(work, "count/logs/one@1")), seconds=300)
    assert slurm.reaches(last, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    assert (work / "runs/count/one@1/digest.txt").read_text() == digest(300)


@pytest.mark.long
def test_a_job_that_is_requeued_continues(slurm, call, work):
    found = jobs(call("run", "count.yaml", SLOWLY))
    slurm.wait_for(lambda: steps(work) > 15)
    slurm("scontrol", "requeue", found["one"])
    require_continued(slurm, work, found["two"])


@pytest.mark.long
def test_when_a_node_dies_its_job_continues_on_another(slurm, call, work):
    found = jobs(call("run", "count.yaml", SLOWLY))
    slurm.wait_for(lambda: steps(work) > 15)
    node = slurm("squeue", "--noheader", f"--job={found['one']}", "--format=%N").strip()
    slurm.kill(node)
    require_continued(slurm, work, found["two"])


@pytest.mark.long
def test_jobs_outlive_a_controller_that_is_killed(slurm, call, work):
    found = jobs(call("run", "count.yaml", SLOWLY))
    slurm.wait_for(lambda: steps(work) > 60)  # 12 s: slurmctld writes its state every 5 s
    slurm.kill("slurmctld")
    time.sleep(5)
    slurm.start_controller()
    assert slurm.reaches(found["two"], "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    assert sum(event["event"] == "start" for event in seen(work, "count/logs/one@1")) == 1
    assert (work / "runs/count/one@1/digest.txt").read_text() == digest(300)
