"""A run in a process of its own, and what its stages' processes and its events say."""

import json
import subprocess
import sys
import time

from cordee import events

MAIN = "from cordee.cli import main; main()"


def start(tmp_path, *arguments, recipe="march.yaml"):
    command = [sys.executable, "-c", MAIN, "run", recipe, *arguments]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def beat(logs, rank=0):
    """What a process said last; None before it says something."""
    try:
        return json.loads((logs / "heartbeats" / str(rank)).read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def reaches(logs, step, rank=0):
    return wait_for(lambda: (told := beat(logs, rank)) and told["step"] >= step and told)


def ends(logs):
    return [event for event in events.read(logs / "events.jsonl") if event["event"] == "ended"]
