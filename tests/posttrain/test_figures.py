"""What TRL measures beside the loss does not depend on how a step is cut into batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_samples import some_chats, write_lines
from dpo_samples import pair

from cordee.files import read_json_lines
from posttrain import dpo, sft
from posttrain.training import metrics

UNEVEN = [
    [*chat[:-1], {"role": "assistant", "content": "Romansh " * (1 + 5 * n)}] for n, chat in enumerate(some_chats(4))
]


def figures(out: Path) -> dict[str, float]:
    """Those of all lines."""
    rows = read_json_lines(out / "metrics.jsonl")
    return {f"{name} at {row['step']}": value for row in rows for name, value in row.items() if name != "grad_norm"}


@pytest.mark.parametrize("stage", [sft, dpo])
def test_figures_are_those_of_the_step(stage: Any, model_folder: Path, tmp_path: Path, new_context: Any) -> None:
    if stage is sft:
        file = write_lines(tmp_path / "a.jsonl", UNEVEN)
    else:
        file = tmp_path / "b.jsonl"
        pairs = [pair(n) | {"chosen": chat[-1:]} for n, chat in enumerate(UNEVEN)]
        file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    found = []
    for at_once in (1, 2, 4):
        context = new_context(f"of{at_once}")
        trainer = {"max_length": 256, "max_steps": 2, "learning_rate": 1e-3, "bf16": False}
        data = [{"path": str(file)}]
        given = {"model": str(model_folder), "data": data, "heldout": data, "trainer": trainer, "global_batch_size": 4}
        manifest = stage.run(stage.Config.model_validate(given | {"per_device_train_batch_size": at_once}), context)
        found.append(figures(context.out))
        assert {"entropy at 1", "mean_token_accuracy at 2", "heldout_entropy at 0"} <= set(found[-1])
        assert manifest["entropy"] == found[-1]["entropy at 2"]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4, abs=1e-5)


def test_weights_of_four_bits_are_counted_as_what_they_stand_for() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Params4bit(torch.randn(64, 32), requires_grad=False, quant_type="nf4").to("cpu")
    assert packed.numel() == 64 * 32 // 2
    assert metrics._parameters(torch.nn.ParameterList([packed])) == 64 * 32
