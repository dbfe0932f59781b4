"""Keys that belong elsewhere: the error says where."""

from pathlib import Path
from typing import Any

import pytest

from cordee import recipe
from cordee.errors import UserError


def error_of(tmp_path: Path, write: Any, keys: str) -> str:
    """The line that a recipe with these keys ends in."""
    (tmp_path / "chats.jsonl").write_text('{"prompt": "hello", "completion": "German"}\n')
    (tmp_path / "model").mkdir()
    stage = f"{{uses: posttrain.sft, model: model, data: [{{path: chats.jsonl}}], {keys}}}"
    with pytest.raises(UserError) as caught:
        recipe.load(write("r.yaml", f"name: r\nseed: 1\nstages:\n  sft: {stage}\n"), [])
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("chat_template_path", "x.jinja", "the stage's `chat_template`"),
        ("pad_token", "'<|im_end|>'", "the stage's `pad_token`"),
        ("eos_token", "x", "the end of an answer into the stage's `chat_template`"),
        ("eval_strategy", "steps", "the stage's `heldout`"),
        ("report_to", "wandb", "the stage's `report_to`"),
        ("save_total_limit", "3", "`save_steps` and `resume_steps` of the stage"),
        ("truncation_mode", "keep_end", "the stage's `overlong`"),
        ("dataset_text_field", "content", "`columns: {yours: text}` beside the file's path"),
        ("dataset_num_proc", "4", "leave it out"),
    ],
)
def test_a_key_that_belongs_elsewhere_names_the_place(
    tmp_path: Path, write: Any, key: str, value: str, instead: str
) -> None:
    """Cases 16 and 38."""
    line = error_of(tmp_path, write, f"trainer: {{{key}: {value}}}")
    assert f"stages.sft.trainer.{key}: the stage sets this itself; leave it out" in line
    assert instead in line


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("learning_rate: 1e-4", "stages.sft.learning_rate: unknown key; write trainer: {learning_rate: …}"),
        ("trainer: {lora: {r: 8}}", "stages.sft.trainer.lora: unknown key; write lora beside trainer"),
        (
            "trainer: {lr_scheduler_type: reduce_lr_on_plateau}",
            "stages.sft.trainer.lr_scheduler_type: reduce_lr_on_plateau follows evaluations of TRL's own",
        ),
        ("heldout: 1.5", "stages.sft.heldout: Input should be less than 1"),
    ],
)
def test_a_key_on_the_wrong_level_names_the_right_one(tmp_path: Path, write: Any, keys: str, line: str) -> None:
    assert line in error_of(tmp_path, write, keys)
