"""An adapter's training goes on after a kill with the same bits, and its reference never moves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import chats, make, pairs_file, sft_keys

from cordee import files
from cordee.stage import Context
from posttrain import dpo, sft
from posttrain.training import watch

NewContext = Callable[[str], Context]


class Killed(BaseException):
    """Ends a run in the middle, with whatever lies on the disk then."""


KINDS: dict[str, dict[str, Any]] = {
    "continued": {},
    "a second one": {"adapter": "new", "lora": {"r": 2}},
    "merged": {"adapter": "new"},
    "added tokens": {"adapter": "new", "added_tokens": ["<x>"], "lora": {"r": 2}},
    "added tokens, all weights": {"adapter": "new", "added_tokens": ["<x>"]},
}


@pytest.mark.parametrize(
    ("stage", "kind"), [(sft, "continued"), (sft, "added tokens"), *((dpo, kind) for kind in KINDS)]
)
def test_a_training_of_an_adapter_that_was_killed_ends_in_the_same_files(
    tmp_path: Path, new_context: NewContext, monkeypatch: pytest.MonkeyPatch, stage: Any, kind: str
) -> None:
    first, data = new_context("first"), chats(tmp_path)
    base = make(tmp_path / "base", "llama_tied")
    sft.run(sft.Config.model_validate(sft_keys(base, data, lora={"r": 2})), first)
    given = sft_keys(first.out, data if stage is sft else pairs_file(tmp_path), **KINDS[kind])
    given |= {"resume_steps": 1, "trainer": given["trainer"] | {"max_steps": 4, "learning_rate": 1e-3}}
    config = stage.Config.model_validate(given)
    whole, killed = new_context("whole"), new_context("killed")
    metrics = stage.run(config, whole)
    original = watch.Watch.on_step_end

    def dying(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        original(self, args, state, control, **rest)
        if state.global_step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(watch.Watch, "on_step_end", dying)
        with pytest.raises(Killed):
            stage.run(config, killed)
    assert stage.run(config, killed) == metrics
    assert "goes on from step 2" in killed.events.read_text()
    for path in files.walk(whole.out):
        assert path.read_bytes() == (killed.out / path.relative_to(whole.out)).read_bytes(), path.name


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"added_tokens": ["<x>"]}),
        ("llama_tied", {"added_tokens": ["<x>"]}),
        ("llama", {"lora": {"r": 2, "modules_to_save": ["lm_head"]}}),
    ],
)
def test_the_reference_of_dpo_does_not_move_with_the_head(
    tmp_path: Path, new_context: NewContext, name: str, keys: dict[str, Any]
) -> None:
    """What the reference says is what the base says, with the adapter off."""
    base = make(tmp_path / "base", name)
    lora = {"r": 2, "trainable_token_indices": list(range(60, 200))} if "lora" not in keys else keys["lora"]
    given = sft_keys(base, pairs_file(tmp_path, 4), **keys | {"lora": lora})
    given |= {"trainer": given["trainer"] | {"max_steps": 3, "train_sampling_strategy": "sequential"}}
    context = new_context("dpo")
    dpo.run(dpo.Config.model_validate(given), context)
    trainer, _ = dpo.build(dpo.Config.model_validate(given), new_context("again"))
    plain, _ = dpo.build(dpo.Config.model_validate(given | {"lora": None}), new_context("plain"))
    expected = plain.train_dataset.reference
    assert trainer.train_dataset.reference == pytest.approx(expected, abs=1e-4)
    first, *_, last = files.read_json_lines(context.out / "metrics.jsonl")
    assert first["loss"] != pytest.approx(last["loss"], abs=1e-3)


@pytest.mark.parametrize(
    "lora", [{"trainable_token_indices": [*range(60, 200)]}, {"target_modules": ["embed_tokens", "q_proj"]}]
)
def test_the_reference_of_an_adapter_is_the_whole_adapter(
    tmp_path: Path, new_context: NewContext, lora: dict[str, Any]
) -> None:
    """It is the adapter as it is when the training begins, with its embeddings and trained tokens."""
    base, first = make(tmp_path / "base", "llama"), new_context("first")
    keys = sft_keys(base, chats(tmp_path), lora={"r": 2, **lora}, trainer={"learning_rate": 0.1})
    sft.run(sft.Config.model_validate(keys), first)
    context = new_context("dpo")
    dpo.run(dpo.Config.model_validate(sft_keys(first.out, pairs_file(tmp_path))), context)
    loss = files.read_json_lines(context.out / "metrics.jsonl")[0]["loss"]
    assert loss == pytest.approx(float(torch.tensor(2.0).log()), abs=1e-6)
