"""Both answers to a prompt in one sequence: the same log-probabilities and gradients, or separate sequences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, make, pairs_file, sft_keys
from preference_samples import METHODS, keys_of, stage_of, write_rows
from safetensors.torch import load_file

from cordee import files
from cordee.errors import Fault
from cordee.stage import Context
from posttrain import dpo
from posttrain.training import preference, shared_prompt

NewContext = Callable[[str], Context]
ONE_STEP = {"max_steps": 1, "learning_rate": 1e-12}


def built(model: Path, file: Path, context: Context, **keys: Any) -> Any:
    trainer = ONE_STEP | keys.pop("trainer", {})
    given = sft_keys(model, file, trainer=trainer, **keys)
    return dpo.build(dpo.Config.model_validate(given), context)[0]


def notes(context: Context) -> str:
    return context.events.read_text()


def gradients(trainer: Any, joins: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    trainer.data_collator.joins = joins
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[at] for at in range(4)]))
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {
        name: one.grad.clone() for name, one in trainer.model.named_parameters() if one.grad is not None
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, tmp_path: Path, new_context: NewContext) -> None:
    context = new_context("dpo")
    # wide weights: those of a new model give all tokens nearly the same probability, whatever they see
    model, no_auxiliary = make(tmp_path / "model", name, initializer_range=0.5), {"router_aux_loss_coef": 0.0}
    trainer = built(model, pairs_file(tmp_path, 4), context, trainer=no_auxiliary)
    if name == "gemma2":  # whose logits are capped
        assert "computed for each answer: attn_implementation is eager" in notes(context)
        return
    assert trainer.data_collator.joins, notes(context)
    assert "prompt is computed once for both answers" in notes(context)
    (loss, found), (expected, wanted) = gradients(trainer, joins=True), gradients(trainer, joins=False)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    scale = max(float(one.abs().max()) for one in wanted.values())
    for key, one in wanted.items():
        torch.testing.assert_close(found[key], one, rtol=1e-3, atol=1e-4 * scale, msg=key)


@pytest.mark.parametrize(
    ("name", "fields", "keys", "why"),
    [
        ("mistral", {"sliding_window": 8}, {}, "together their log-probabilities are off by"),
        ("gemma3", {"sliding_window": 8}, {}, "together their log-probabilities are off by"),
        ("llama", {}, {"trainer": {"model_init_kwargs": {"attn_implementation": "eager"}}}, "is eager"),
        ("mixtral", {}, {"trainer": {"router_aux_loss_coef": 0.01}}, "the loss that balances experts"),
    ],
)
def test_what_would_be_computed_otherwise_is_computed_separately(
    tmp_path: Path, new_context: NewContext, name: str, fields: Any, keys: Any, why: str
) -> None:
    context = new_context("dpo")
    model = make(tmp_path / "model", name, initializer_range=0.5, **fields)
    trainer = built(model, pairs_file(tmp_path, 4), context, **keys)
    assert not trainer.data_collator.joins
    assert f"computed for each answer: {why}" in notes(context).replace("attn_implementation is", "is")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_made_before_has_the_answer(
    model_folder: Path, tmp_path: Path, new_context: NewContext, workers: int
) -> None:
    """A sharded model is looked at once the trainer has its loader, which workers read from when they start."""
    given = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    trainer = built(model_folder, pairs_file(tmp_path, 4), new_context("dpo"), trainer=given)
    trainer.data_collator.joins = False
    loader = trainer.get_train_dataloader()
    trainer.data_collator.joins = True
    assert all("joint_at" in batch for batch in loader)


def test_answers_that_see_each_other_are_noticed(
    tmp_path: Path, new_context: NewContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = shared_prompt.inputs

    def leaking(batch: Any) -> Any:
        given = right(batch)
        return given | {"attention_mask": torch.ones_like(given["attention_mask"]).tril()}

    monkeypatch.setattr(shared_prompt, "inputs", leaking)
    context = new_context("dpo")
    model = make(tmp_path / "model", "llama", initializer_range=0.5)
    assert not built(model, pairs_file(tmp_path, 4), context).data_collator.joins
    assert "log-probabilities are off by" in notes(context)


@pytest.mark.parametrize("field", ["joint_input_ids", "joint_position_ids", "joint_segments", "joint_at"])
def test_joint_sequences_that_are_not_the_rows_are_a_fault(
    model_folder: Path, tmp_path: Path, new_context: NewContext, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    trainer = built(model_folder, pairs_file(tmp_path, 4), new_context("right"))
    right = shared_prompt.joined

    def wrong(*given: Any) -> Any:
        made = right(*given)
        made[field][0, 3] += 1
        return made

    monkeypatch.setattr(shared_prompt, "joined", wrong)
    with pytest.raises(Fault, match="the joint sequences"):
        preference.check_batches(trainer, trainer.train_dataset)


def test_prompts_of_one_token_and_none() -> None:
    """By hand: `[prompt - 1]`, then the prompt's last token and an answer, twice."""

    def ids(*tokens: int) -> Any:
        return np.array(tokens, np.int32)

    prompts = [ids(1, 2, 3), ids(4), ids()]
    chosen, rejected = [ids(5, 6), ids(7), ids(8, 9)], [ids(10), ids(11, 12), ids(13, 14)]
    answers = [list(zip(prompts, side, strict=True)) for side in (chosen, rejected)]
    labels = torch.full((6, 5), -100)
    for at, (prompt, answer) in enumerate(answers[0] + answers[1]):
        labels[at, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    made = shared_prompt.joined(answers, labels, 0, None)
    assert made["joint_input_ids"].tolist() == [
        [1, 2, 3, 5, 6, 3, 10],
        [4, 7, 4, 11, 12, 0, 0],
        [8, 9, 13, 14, 0, 0, 0],
    ]
    assert made["joint_position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 1, 0, 1, 2, 0, 0], [0, 1, 0, 1, 0, 0, 0]]
    assert made["joint_segments"].tolist() == [
        [0, 0, 1, 1, 1, 2, 2],
        [1, 1, 2, 2, 2, 127, 127],
        [1, 1, 2, 2, 127, 127, 127],
    ]
    # the first token of an answer without a prompt is predicted from nothing, as in a sequence of its own
    assert made["joint_labels"].tolist() == [
        [-100, -100, -100, 5, 6, -100, 10], [-100, 7, -100, 11, 12, -100, -100], [-100, 9, -100, 14, -100, -100, -100]
    ]  # fmt: skip
    assert made["joint_at"].tolist()[3] == [0, 4, 5, 0]
    mask = shared_prompt.inputs(made)["attention_mask"][0, 0].int().tolist()
    assert mask[6] == [1, 1, 0, 0, 0, 1, 1]
    assert mask[4] == [1, 1, 1, 1, 1, 0, 0]


PAIRED = [method for method in METHODS if method.partition(" ")[0] in ("dpo", "orpo", "cpo")]


@pytest.mark.parametrize("method", PAIRED)
def test_a_training_is_the_same(
    model_folder: Path, tmp_path: Path, new_context: NewContext, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    rows, found = write_rows(tmp_path / "rows.jsonl"), []
    stage = stage_of(method)
    for name in ("together", "apart"):
        context = new_context(name)
        keys = keys_of(method, model_folder, rows, per_device_train_batch_size=4, heldout=0.25, deterministic=False)
        stage.run(stage.Config.model_validate(keys), context)
        assert ("once for both answers" in notes(context)) == (name == "together")
        metrics = [row for row in files.read_json_lines(context.out / "metrics.jsonl") if "loss" in row]
        found.append((load_file(context.out / "model.safetensors"), metrics[-1]["loss"]))
        monkeypatch.setattr(shared_prompt, "use_where_exact", lambda *_: None)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)
    moved = torch.cat([(found[1][0][name] - value).flatten() for name, value in found[0][0].items()])
    assert float(moved.abs().max()) < 1e-4
    # A drift in one direction shows in the mean long before it does in any single weight.
    assert abs(float(moved.mean())) <= 5 * float(moved.std()) / len(moved) ** 0.5 + 1e-9
