"""The made-up store that the report's tests read, and a report of it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

SHOWN = ("tokenizer", "base", "sft", "dpo", "merged", "benchmark", "samples")
PROOFS = ("prove-masks", "prove-resume")
Report = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> dict[str, Path]:
    """The folders of a whole recipe's artifacts, by stage."""
    import fake_store

    return fake_store.make(tmp_path / "runs")


@pytest.fixture
def report(store: dict[str, Path], tmp_path: Path) -> Report:
    """Writes a report of some stages and returns its folder."""
    from cordee.stage import Context
    from eval.report import Config, run

    def call(shown: tuple[str, ...] = SHOWN, proofs: tuple[str, ...] = PROOFS, title: str = "") -> Path:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        config = Config.model_validate(
            {
                "title": title,
                "artifacts": [str(store[name]) for name in shown],
                "certificates": [str(store[name]) for name in proofs],
            }
        )
        run(config, Context(out=out, seed=0, events=tmp_path / "events.jsonl"))
        return out

    return call
