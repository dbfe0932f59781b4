"""A pretraining under random kills ends in the bits of one that nothing disturbed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_random_kills_change_no_bit():
    """`benchmarks/kills.py` takes a hundred."""
    asked = ("--kills", "6", "--mean", "4", "--steps", "400")
    command = [sys.executable, "benchmarks/kills.py", *asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("the weights are the same bits\n")
    assert int(re.search(r"^(\d+) kills: ", done.stdout, re.MULTILINE)[1]) >= 1
    assert int(re.search(r"at most (\d+), ", done.stdout)[1]) <= 2 * 20, "two intervals, where a write was killed"
