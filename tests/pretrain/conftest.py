"""Tokens made by hand, job files of trainings on them, and the trainings themselves."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from token_files import training, write_tokens


@pytest.fixture
def make_tokens(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tokens artifact: `make_tokens("a", [5, 9])`."""
    return lambda name, lengths, **options: write_tokens(tmp_path / name, lengths, **options)


@pytest.fixture
def job(tmp_path: Path, make_tokens: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a job file for `pretrain.train` on the micro model: `job("a", max_steps=6)`; its folder is `<tmp>/a`."""
    lengths = np.random.default_rng(1).integers(4, 60, 150).tolist()
    tokens = make_tokens("tokens", lengths)

    def write(name: str, **keys: object) -> Path:
        folder = tmp_path / name
        (folder / "out").mkdir(parents=True, exist_ok=True)
        told = {
            "config": training(tokens, **keys),
            "seed": 17,
            "out": str(folder / "out"),
            "events": str(folder / "events.jsonl"),
        }
        (folder / "job.json").write_text(json.dumps(told))
        return folder

    return write


@pytest.fixture
def trained(job: Callable[..., Path]) -> Callable[..., tuple[Path, dict[str, object]]]:
    """Trains in this process: `out, metrics = trained("a", max_steps=6)`; called again it goes on."""
    from accelerate.state import AcceleratorState

    from cordee import worker
    from cordee.stage import Context
    from pretrain import train

    def call(name: str, **keys: object) -> tuple[Path, dict[str, object]]:
        AcceleratorState._reset_state(reset_partial_state=True)  # it is one for the process, and others leave theirs
        folder = job(name, **keys)
        told = json.loads((folder / "job.json").read_text())
        context = Context(out=folder / "out", seed=told["seed"], events=folder / "events.jsonl")
        return context.out, worker.run_stage(train.Config.model_validate(told["config"]), context, train.run)

    return call


def metrics_of(out: Path) -> list[dict[str, float]]:
    """The training's lines of `metrics.jsonl`, without what the clock says."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows]
