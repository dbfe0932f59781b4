"""Which of the checkpoints that a training has published are kept."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from cordee import files
from cordee.config import Keep

FIGURES = {"heldout_bits_per_byte": 1, "heldout_loss": 1, "heldout_reward": -1}
"""What `best` goes by: the first of these that was measured, and 1 where less is better."""
DROPPED = ".dropped-"
"""What the name of a checkpoint begins with while it is deleted."""


def apply(out: Path, keep: Keep) -> list[int]:
    """Delete the checkpoints that are not to be kept; returns their steps.

    Args:
        out: the output folder of a training, with `checkpoints/<step>/` and `metrics.jsonl`.
        keep: those to keep.
    """
    folder = out / "checkpoints"
    for half in folder.glob(f"{DROPPED}*"):
        shutil.rmtree(half)
    steps = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())
    kept = set(steps[-keep.last :] if keep.last else ())
    kept |= {step for step in steps if keep.every and step % keep.every == 0}
    ranked = sorted((value, -step) for step, value in _measured(out / "metrics.jsonl") if step in steps)
    kept |= {-step for _, step in ranked[: keep.best]}
    dropped = [step for step in steps if step not in kept]
    for step in dropped:  # renamed first: a kill leaves no half of a checkpoint under its name
        (folder / f"{step}").rename(folder / f"{DROPPED}{step}")
        shutil.rmtree(folder / f"{DROPPED}{step}")
    return dropped


def _measured(metrics: Path) -> Iterator[tuple[int, float]]:
    """The held-out figure of each step that has one; the less, the better."""
    rows = files.read_json_lines(metrics) if metrics.exists() else []
    name = next((name for name in FIGURES if any(name in row for row in rows)), None)
    return ((row["step"], FIGURES[name] * row[name]) for row in rows if name and name in row)
