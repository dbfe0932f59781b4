"""One run at a time works on a stage, and a dead one's lock does not stand in the way."""

import json
import os
import platform
import subprocess
import sys
import time

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
