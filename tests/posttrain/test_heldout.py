"""Rows that are held out: measured as the model is, whatever the batches, and never trained on."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoding
import pytest
from architectures import chats, make, mean_loss, pairs_file
from chat_samples import some_chats, write_lines
from dpo_samples import pair
from transformers import AutoConfig, AutoTokenizer

from cordee.chat.source import Limits
from cordee.errors import UserError
from cordee.files import read_json_lines
from cordee.stage import Context
from posttrain import dpo, sft
from posttrain.training.watch import Watch


def keys(model_folder: Path, file: Path, **given: Any) -> dict[str, Any]:
    trainer = {"max_length": 128, "max_steps": 2, "learning_rate": 1e-3, "bf16": False, **given.pop("trainer", {})}
    data = [{"path": str(file)}]
    return {"model": str(model_folder), "data": data, "global_batch_size": 4, "trainer": trainer, **given}


def heldout_lines(out: Path) -> dict[int, dict[str, float]]:
    rows = read_json_lines(out / "metrics.jsonl")
    return {row["step"]: row for row in rows if "heldout_loss" in row}


@pytest.mark.parametrize(("packing", "per_device", "lora"), [(False, 4, None), (False, 1, {"r": 4}), (True, 2, None)])
def test_the_loss_is_the_models_before_on_the_way_and_at_the_end(
    model_folder: Path, tmp_path: Path, context: Context, packing: bool, per_device: int, lora: Any
) -> None:
    train, apart = write_lines(tmp_path / "a.jsonl", some_chats(16)), write_lines(tmp_path / "b.jsonl", some_chats(7))
    given = keys(model_folder, train, heldout=[{"path": str(apart)}], eval_steps=1, trainer={"packing": packing})
    given |= {"per_device_train_batch_size": per_device, "lora": lora, "save_steps": 1}
    config = sft.Config.model_validate(given)
    metrics = sft.run(config, context)
    found = heldout_lines(context.out)
    assert list(found) == [0, 1, 2]
    chats = encoding.chats(apart, AutoTokenizer.from_pretrained(model_folder), Limits(128, 512, 1000))
    assert found[0]["heldout_loss"] == pytest.approx(mean_loss(model_folder, chats), rel=1e-5)
    if lora is None:
        after = mean_loss(context.out / "checkpoints" / "1", chats)
        assert found[1]["heldout_loss"] == pytest.approx(after, rel=1e-5)
        assert metrics["heldout_loss"] == pytest.approx(mean_loss(context.out, chats), rel=1e-5)
    assert found[2]["heldout_loss"] < found[0]["heldout_loss"]


def test_a_share_is_held_out_and_the_steps_are_those_of_the_rest(
    model_folder: Path, tmp_path: Path, new_context: Callable[[str], Context]
) -> None:
    file = write_lines(tmp_path / "a.jsonl", some_chats(20))
    config = sft.Config.model_validate(keys(model_folder, file, heldout=0.25))
    with_share = new_context("a")
    trainer, chats = sft.open_trainer(config, with_share)
    assert (len(chats), len(trainer.eval_dataset)) == (15, 5)
    notes = [json.loads(line)["text"] for line in with_share.events.read_text().splitlines()]
    assert "5 sequences are held out, 15 are trained on" in notes
    kept = {chat.number for chat in chats}
    rest = write_lines(tmp_path / "b.jsonl", [c for n, c in enumerate(some_chats(20), 1) if n in kept])
    one, other = with_share, new_context("b")
    sft.run(config, one)
    sft.run(sft.Config.model_validate(keys(model_folder, rest)), other)
    losses = [[row["loss"] for row in read_json_lines(c.out / "metrics.jsonl") if "loss" in row] for c in (one, other)]
    assert losses[0] == losses[1]
    assert list(heldout_lines(one.out)) == [0, 2]
    trainer, chats = sft.open_trainer(
        sft.Config.model_validate(keys(model_folder, file, heldout=0.01)), new_context("c")
    )
    assert (len(chats), len(trainer.eval_dataset)) == (19, 1), "a share of less than one chat is one"
    same = write_lines(tmp_path / "same.jsonl", some_chats(1) * 5)
    with pytest.raises(UserError, match="heldout: all 5 rows have the same prompt"):
        sft.open_trainer(sft.Config.model_validate(keys(model_folder, same, heldout=0.25)), new_context("d"))


def test_a_run_killed_before_its_first_resume_point_measures_step_0_once(
    model_folder: Path, tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft.Config.model_validate(
        keys(model_folder, write_lines(tmp_path / "a.jsonl", some_chats(20)), heldout=0.25)
    )

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            sft.run(config, context)
    assert list(heldout_lines(context.out)) == [0]
    sft.run(config, context)
    steps = [row["step"] for row in read_json_lines(context.out / "metrics.jsonl") if "heldout_loss" in row]
    assert steps == [0, 2]


def test_pairs_are_held_out_too(model_folder: Path, tmp_path: Path, context: Context) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(n)) + "\n" for n in range(20)))
    trainer = {"learning_rate": 1e-2}
    given = keys(model_folder, file, heldout=0.3, eval_steps=1, lora={"r": 4}, trainer=trainer)
    metrics = dpo.run(dpo.Config.model_validate(given | {"per_device_train_batch_size": 4}), context)
    found = heldout_lines(context.out)
    assert list(found) == [0, 1, 2]
    assert found[0]["heldout_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found[0]["heldout_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert metrics["heldout_loss"] == found[2]["heldout_loss"] != found[0]["heldout_loss"]


def test_trackers_are_told(model_folder: Path, tmp_path: Path, new_context: Callable[[str], Context]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = write_lines(tmp_path / "a.jsonl", some_chats(16))
    one = new_context("a")
    sft.run(sft.Config.model_validate(keys(model_folder, file, heldout=0.25, report_to=["tensorboard"])), one)
    events = EventAccumulator(str(next((one.out / "logs").rglob("events*")).parent)).Reload()
    assert {"loss", "heldout_loss", "learning_rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("heldout_loss")] == [0, 2]
    with pytest.raises(UserError, match="report_to: tracker 'wandb' is not installed"):
        sft.run(sft.Config.model_validate(keys(model_folder, file, report_to=["wandb"])), new_context("b"))
    with pytest.raises(UserError, match="report_to: Unsupported logging capability: nonsense"):
        sft.run(sft.Config.model_validate(keys(model_folder, file, report_to=["nonsense"])), new_context("c"))


@pytest.mark.parametrize("stage", [sft, dpo])
def test_an_auxiliary_loss_stays_out_and_the_published_config_is_the_bases(
    stage: Any, tmp_path: Path, new_context: Callable[[str], Context]
) -> None:
    model = make(tmp_path / "model", "qwen3_moe")
    file = chats(tmp_path) if stage is sft else pairs_file(tmp_path)
    context, trainer = new_context("a"), {"learning_rate": 1e-12, "router_aux_loss_coef": 0.1}
    given = keys(model, file, heldout=[{"path": str(file)}], trainer=trainer | {"max_length": 256})
    metrics = stage.run(stage.Config.model_validate(given), context)
    found = encoding.chats(file, AutoTokenizer.from_pretrained(model), Limits(256, 512, 100000)) if stage is sft else []
    expected = mean_loss(model, found) if stage is sft else math.log(2)
    assert metrics["heldout_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["loss"] > metrics["heldout_loss"] + 0.1
    assert "8 of 8 held-out sequences are trained on too" in context.events.read_text()
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (context.out, model))
    assert ours == theirs | {name: ours[name] for name in ("_name_or_path", "dtype")}
    assert (ours["use_cache"], ours["output_router_logits"]) == (True, False)
