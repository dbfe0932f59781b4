"""One run at a time works on a stage, and a dead one's lock does not stand in the way."""

import errno
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cordee import lock
from cordee.errors import Fault


def test_a_second_holder_is_told_who_holds_it(tmp_path):
    path = tmp_path / "stage.lock"
    with lock.hold(path), pytest.raises(Fault, match=f"process {os.getpid()} on"), lock.hold(path):
        pass
    assert not path.exists()


def test_a_killed_holders_lock_is_taken_over(tmp_path):
    path = tmp_path / "stage.lock"
    code = f"""
import os, signal
from pathlib import Path
from cordee import lock
with lock.hold(Path({str(path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert path.exists()
    with lock.hold(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_another_hosts_lock_holds_as_long_as_its_heart_beats(tmp_path):
    path = tmp_path / "stage.lock"
    path.write_text(json.dumps({"host": f"not-{platform.node()}", "pid": 1, "started": "1"}))
    with pytest.raises(Fault, match="another run holds this stage"), lock.hold(path):
        pass
    long_ago = time.time() - lock.DEAD_AFTER_S - 1
    os.utime(path, (long_ago, long_ago))
    with lock.hold(path):
        pass


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path):
    path = tmp_path / "stage.lock"
    path.write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "started": "before the last boot"}))
    with lock.hold(path):
        pass


def test_of_two_that_find_a_lock_dead_only_one_takes_it(tmp_path):
    path = tmp_path / "stage.lock"
    path.write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "started": "before the last boot"}))
    found = lock._state(path)
    with lock.hold(path):  # the one is faster between the other's look and the other's rename
        with pytest.raises(Fault, match=f"another run holds this stage; process {os.getpid()} on"):
            lock._take_away(path, found)
        assert json.loads(path.read_text()) == lock.owner(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_created_just_now_is_not_taken_for_one_that_was_left_empty(tmp_path):
    path = tmp_path / "stage.lock"
    path.touch()
    os.utime(path, (0, 0))
    found = lock._state(path)
    path.unlink()
    path.touch()
    with pytest.raises(Fault, match="another run holds this stage"):
        lock._take_away(path, found)
    assert path.exists()


def test_of_many_at_once_one_takes_a_dead_lock(tmp_path):
    path, code = (
        tmp_path / "stage.lock",
        """
import sys, time
from pathlib import Path
from cordee import lock
from cordee.errors import Fault
start = float(sys.argv[2])
time.sleep(max(0, start - time.time()))
try:
    with lock.hold(Path(sys.argv[1])):
        print("mine")
        time.sleep(3)
except Fault:
    pass
""",
    )
    path.write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "started": "before the last boot"}))
    command = [sys.executable, "-c", code, str(path), str(time.time() + 1.5)]
    takers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert "".join(taker.communicate()[0] for taker in takers) == "mine\n"
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_someone_elses_by_now_is_neither_touched_nor_removed(tmp_path, monkeypatch):
    path = tmp_path / "stage.lock"
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    with lock.hold(path):
        path.write_text("someone else's")
        os.utime(path, (1, 1))
        time.sleep(0.5)
        assert path.stat().st_mtime == 1
    assert path.read_text() == "someone else's"


def test_a_heart_beats_as_long_as_the_lock_is_held(tmp_path, monkeypatch):
    path = tmp_path / "stage.lock"
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    with lock.hold(path):
        os.utime(path, (1, 1))
        time.sleep(0.5)
        assert path.stat().st_mtime > 1


def test_a_heart_beats_on_after_an_error_of_the_file_system(tmp_path, monkeypatch):
    path, touch, calls = tmp_path / "stage.lock", os.utime, []

    def failing_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        touch(*arguments)

    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    with lock.hold(path) as held:
        touch(path, (1, 1))
        monkeypatch.setattr(lock.os, "utime", failing_once)
        time.sleep(0.5)
        assert (len(calls) > 1, path.stat().st_mtime > 1) == (True, True)
        held.require()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("someone else's")])
def test_a_holder_is_told_that_its_lock_is_not_its_own_any_more(tmp_path, damage):
    path = tmp_path / "stage.lock"
    with lock.hold(path) as held:
        held.require()
        damage(path)
        with pytest.raises(Fault, match=r"stage\.lock: another run took this stage over; "):
            held.require()


def test_a_process_that_was_killed_and_not_yet_waited_for_is_gone():
    process = subprocess.Popen(["sleep", "60"])
    known = lock.owner(process.pid)
    assert not lock.is_gone(known)
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert lock.is_gone(known)
    process.wait()
    assert lock.is_gone(known)
