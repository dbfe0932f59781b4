"""The import contracts see what they forbid: each fault is planted in a copy of the packages."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


@pytest.fixture
def lint(tmp_path):
    for name in ("cordee", "pretrain", "posttrain", "eval"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def call() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LINT, "--no-cache"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)

    return call


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("pretrain/data/mixture.py", "from pretrain import train", "pretrain.data.mixture -> pretrain.train"),
        (
            "posttrain/training/masks.py",
            "from posttrain import prove_masks",
            "posttrain.training.masks -> posttrain.prove_masks",
        ),
        ("posttrain/sft.py", "from posttrain import dpo", "posttrain.sft -> posttrain.dpo"),
        ("eval/brand_new.py", "", "eval.brand_new"),
    ],
)
def test_a_part_that_imports_a_stage_is_seen(lint, tmp_path, module, line, broken):
    with (tmp_path / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    linted = lint()
    assert linted.returncode == 1
    assert broken in linted.stdout


def test_the_packages_as_they_are_keep_them(lint):
    linted = lint()
    assert linted.returncode == 0, linted.stdout + linted.stderr
