"""What a stage is given, in a folder of the test's own."""

from pathlib import Path

import pytest

from cordee.stage import Context


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A stage's context, with its output folder already created."""
    (tmp_path / "out").mkdir()
    (tmp_path / "run").mkdir()
    return Context(out=tmp_path / "out", seed=17, events=tmp_path / "run" / "events.jsonl")
