"""GRPO trains on what it samples, with transformers generating; goes on after a stop or a kill to the same bits."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rollout_samples import config, lines, notes, prompts

from cordee.stage import Context
from posttrain import grpo


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """A file of prompts."""
    return prompts(tmp_path / "prompts.jsonl")


def test_an_adapter_is_trained_to_a_higher_reward(
    model_folder: Path, asked: Path, new_context: Callable[[str], Context]
) -> None:
    context = new_context("grpo")
    found = grpo.run(config(model_folder, asked, trainer={"max_steps": 12}), context)
    rows = [row for row in lines(context) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    print(rows[0], found, notes(context))
