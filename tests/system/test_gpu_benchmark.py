"""`benchmarks/gpu.py` from end to end on the CPU, with a very small model: the same script as on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_HERE = ("pretraining: FSDP2 on one process", "SFT: packed with flash attention 2")
"""What needs a GPU: it is told as failed, and the next part begins."""


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_part_that_needs_no_gpu_is_measured(tmp_path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--shape", "tiny", "--cpu", "--minutes", "100"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--json", str(file)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(file.read_text())
    failed = [part for part in told["parts"] if not part["outcome"].startswith("done")]
    assert {part["name"] for part in failed} <= set(NOT_HERE), failed
    assert len(told["parts"]) == 11
    for part in told["parts"]:
        assert f"| {part['name']} |" in done.stdout
        if part["outcome"] == "done" and part is not told["parts"][0]:
            assert part["tokens_per_s"] > 0
            assert 0 < part["loss"] < 20 or part["name"].startswith("GRPO")
    assert told["hardware"]["gpu"] is None
    assert "same weights, bit for bit" in done.stdout


def test_a_step_is_timed_by_what_a_stage_reports(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from processes import step_s

    def reported(*steps):
        return [{"unit": "rows", "done": 5, "time": 1.0}, *({"unit": "steps", "done": n, "time": t} for n, t in steps)]

    assert step_s(reported((0, 0.0), (1, 9.0), (4, 10.0), (8, 14.0), (12, 18.0)), 4) == 1.0
    assert step_s(reported((0, 0.0), (1, 1.0), (12, 1.55)), 4) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="1 steps are reported"):
        step_s(reported((0, 0.0), (12, 1.0)), 4)


def test_a_part_that_is_late_or_fails_does_not_end_the_others(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    (tmp_path / "runs").mkdir()
    shape = gpu.SHAPES["tiny"]
    wrong = gpu.Part("wrong", "posttrain.sft", {"model": "nothing"})
    result = gpu.attempted(wrong, shape, tmp_path, 600)
    assert result.outcome.startswith("failed: ")
    assert "wrong.yaml" in result.outcome
    late = gpu.attempted(wrong, shape, tmp_path, 1.0)
    assert late.outcome.startswith(("failed: not done after 1 s", "failed: cordee"))
    assert gpu.attempted(wrong, shape, tmp_path, 0.5).outcome == "not started: no time is left"
    assert gpu.row(result).count("|") == 10
