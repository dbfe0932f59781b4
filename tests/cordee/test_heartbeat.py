"""Heartbeats: what a process does stands in a file of its own, cheaply, and is read while it is written."""

import json
import os
import subprocess
import sys
import time

import pytest

from cordee import heartbeat, machine
from cordee.heartbeat import Heart


def test_a_process_tells_its_step_its_phase_and_the_seconds_of_each(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    heart = Heart(tmp_path)
    (said,) = heartbeat.read(tmp_path)
    assert (said.rank, said.pid, said.phase, said.is_here) == (3, os.getpid(), "import", True)
    assert said.started == machine.started(os.getpid())
    heart.begin("data", 40)
    for step in (41, 42):
        time.sleep(0.02)
        heart.enter("step")
        time.sleep(0.01)
        heart.alone()
        time.sleep(0.03)
        heart.stepped(step)
    heart.enter("checkpoint")
    (said,) = heartbeat.read(tmp_path)
    assert (said.step, said.taken, said.phase) == (42, 2, "checkpoint")
    assert said.spent["data"] > 0.04
    assert said.spent["step"] > 0.08
    assert 0.03 < said.own_s < said.spent["data"] + said.spent["step"]
    assert (tmp_path / "heartbeats/3").stat().st_size == heartbeat.BYTES
    heartbeat.clear(tmp_path)
    assert heartbeat.read(tmp_path) == []


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    Heart(tmp_path)
    (tmp_path / "heartbeats/1").write_text('{"rank": 1, "ho')
    (tmp_path / "heartbeats/2").write_text(json.dumps({"rank": 2}))
    assert [beat.rank for beat in heartbeat.read(tmp_path)] == [0]


def test_it_costs_less_than_a_hundredth_of_a_step_of_ten_milliseconds(tmp_path):
    heart, steps = Heart(tmp_path), 2000
    began = time.process_time()
    for step in range(steps):
        heart.begin("data", step)
        heart.enter("step")
        heart.alone()
        heart.stepped(step + 1)
    assert (time.process_time() - began) / steps < 0.01 * 0.01


def test_a_file_system_that_fails_for_a_moment_ends_no_training(tmp_path):
    heart = Heart(tmp_path / "logs")
    heartbeat.clear(tmp_path / "logs")
    (tmp_path / "logs/heartbeats").rmdir()
    (tmp_path / "logs").rmdir()
    (tmp_path / "logs").write_text("in its place")
    heart._closed -= 2 * heartbeat.SHOWN_S
    heart.enter("data")
    (tmp_path / "logs").unlink()
    heart.enter("step")
    assert heartbeat.read(tmp_path / "logs")[0].phase == "step"


@pytest.mark.parametrize("code", ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"], ids=["waits", "holds the GIL"])
def test_a_process_writes_its_stacks_when_it_is_asked(code):
    program = f"import ctypes, time; from cordee import heartbeat; heartbeat.register(); print(flush=True); {code}"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(heartbeat.TRACE)
    told = process.stderr.readline() + process.stderr.readline()
    process.kill()
    process.communicate()
    assert "most recent call first" in told
    assert 'File "<string>", line 1 in <module>' in told
