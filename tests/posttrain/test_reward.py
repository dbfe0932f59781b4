"""A reward model learns to prefer, goes on after a stop to the same bits, and is what is published."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_samples import metrics_of
from stopping import StopsAfter

from cordee.cost import Cost
from cordee.errors import Fault, Stopped, UserError
from cordee.stage import Context
from posttrain import reward
from posttrain.rewards import reward_model
from posttrain.training import adapters, calibration, reward_trainer

NewContext = Callable[[str], Context]


def config(model: Path, data: Path, **changes: Any) -> reward.Config:
    """Six steps of eight pairs."""
    trainer = {"learning_rate": 5e-3, "num_train_epochs": 2, "max_length": 128, "bf16": False}
    values = {
        "model": str(model), "data": [{"path": str(data)}], "global_batch_size": 8, "per_device_train_batch_size": 4,
        "save_steps": [3], "resume_steps": 2, "lora": {"r": 4, "lora_alpha": 8}, "precision": "float32", **changes,
        "trainer": {**trainer, **changes.get("trainer", {})},
    }  # fmt: skip
    return reward.Config.model_validate(values)


def opened(folder: Path) -> Any:
    """As a user opens it."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize("lora", [{"r": 4, "lora_alpha": 8}, None])
def test_it_learns_to_prefer_and_a_whole_model_is_published(
    lora: dict[str, int] | None, model_folder: Path, pairs_file: Path, new_context: NewContext
) -> None:
    context = new_context("reward")
    rate = 5e-3 if lora else 1e-3
    asked = config(model_folder, pairs_file, lora=lora, heldout=0.25, trainer={"learning_rate": rate})
    metrics = reward.run(asked, context)
    rows = [row for row in metrics_of(context) if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["accuracy"] == 1.0
    assert {"margin", "mean_reward", "tokens"} <= rows[-1].keys()
    assert metrics["rows"] == 18
    told = json.loads((context.out / "calibration.json").read_text())
    assert told["pairs"] == 6
    assert told["accuracy"] == metrics["heldout_accuracy"] == 1.0
    assert told["margin_mean"] == pytest.approx(metrics["heldout_margin"], abs=1e-5)
    assert metrics["expected_calibration_error"] == told["expected_calibration_error"]
    names = {path.name for path in context.out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "calibration.json"} <= names
    assert not {"adapter_config.json", "resume"} & names
    model, _ = opened(context.out), opened(context.out / "checkpoints" / "3")
    assert (type(model).__name__, model.config.num_labels) == ("ApertusForSequenceClassification", 1)
    scorer = reward_model.Scorer.open(context.out, "auto", None, 4)
    prompt = [{"role": "user", "content": "Which language is this? Tuots umans naschan libers. 0"}]
    said = [[{"role": "assistant", "content": name}] for name in ("German", "Italian", " ")]
    right, wrong, empty = (row["reward"] for row in scorer.measure([prompt] * 3, said, {}))
    assert right > wrong
    assert math.isfinite(empty)


def test_a_stopped_run_goes_on_to_the_same_bits(model_folder: Path, pairs_file: Path, new_context: NewContext) -> None:
    whole, broken = new_context("whole"), new_context("broken")
    asked = config(model_folder, pairs_file, heldout=0.25, save_steps=[])
    reward.run(asked, whole)
    with pytest.raises(Stopped, match="step 3 of"):
        reward.run(asked, StopsAfter(broken.out, broken.seed, broken.events))
    reward.run(asked, broken)
    for name in ("model.safetensors", "config.json", "calibration.json"):
        assert (whole.out / name).read_bytes() == (broken.out / name).read_bytes(), name
    assert metrics_of(whole) == metrics_of(broken)


def test_the_loss_is_that_of_bradley_and_terry(model_folder: Path, pairs_file: Path, context: Context) -> None:
    """By hand: rewards one by one from the last token's hidden state and the head, then -log sigmoid(margin)."""
    coefficient = 0.1
    asked = config(model_folder, pairs_file, trainer={"center_rewards_coefficient": coefficient})
    trainer, data = reward.build(asked, context)
    assert data.rows == 24
    rows = list(trainer.train_dataset.select(range(4)))
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    loss = trainer.compute_loss(trainer.model, inputs).item()
    model = trainer.model.get_base_model().double()

    def one(ids: list[int]) -> float:
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            return float(model.score(hidden))

    pairs = [(one(row["chosen_ids"]), one(row["rejected_ids"])) for row in rows]
    expected = sum(math.log1p(math.exp(low - high)) + coefficient * (high + low) ** 2 for high, low in pairs) / 4
    assert loss == pytest.approx(expected, rel=1e-4)


def test_a_reward_model_is_trained_on(model_folder: Path, pairs_file: Path, new_context: NewContext) -> None:
    first, second = new_context("first"), new_context("second")
    reward.run(config(model_folder, pairs_file, save_steps=[]), first)
    one = config(first.out, pairs_file, save_steps=[], lora=None, trainer={"max_steps": 1, "learning_rate": 1e-6})
    reward.run(one, second)
    before, after = opened(first.out), opened(second.out)
    assert float((before.score.weight - after.score.weight).abs().max()) < 1e-5
    assert metrics_of(second)[0]["accuracy"] == 1.0


def test_other_rows_in_the_batches_are_noticed(
    model_folder: Path, pairs_file: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    collate = reward_trainer.TokenRewardTrainer

    class Shifted(collate):
        def __init__(self, *args: Any, **rest: Any) -> None:
            super().__init__(*args, **rest)
            own = self.data_collator
            self.data_collator = lambda rows: {**(batch := own(rows)), "input_ids": batch["input_ids"].roll(1, 0)}

    monkeypatch.setattr(reward_trainer, "TokenRewardTrainer", Shifted)
    with pytest.raises(Fault, match="the trainer's batches are not the pairs"):
        reward.build(config(model_folder, pairs_file), context)


def test_a_merge_that_changes_rewards_is_noticed(
    model_folder: Path, pairs_file: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = adapters.merge

    def wrong(adapted: Any) -> Any:
        merged = merge(adapted)
        merged.score.weight.data *= 1.5
        return merged

    monkeypatch.setattr(adapters, "merge", wrong)
    with pytest.raises(Fault, match="merged, rewards differ from base and adapter by"):
        reward.run(config(model_folder, pairs_file, save_steps=[], trainer={"max_steps": 2}), context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"r": 4, "lora_dropout": 0.1}}, "lora.lora_dropout: every dropout is switched off"),
        ({"quantization": {"load_in_4bit": True}}, "quantization: a reward model is published whole"),
    ],
)
def test_what_would_be_without_effect_is_refused(
    changes: dict[str, Any], message: str, model_folder: Path, pairs_file: Path, context: Context
) -> None:
    with pytest.raises(UserError, match=message):
        reward.build(config(model_folder, pairs_file, **changes), context)


def test_what_is_no_reward_model_is_no_reward(model_folder: Path, tmp_path: Path, context: Context) -> None:
    from reward_samples import score_config, some_answers

    from posttrain import score

    asked = score_config(some_answers(tmp_path / "a.jsonl"), rewards=[{"model": str(model_folder)}])
    with pytest.raises(UserError, match="is a language model without a head that gives a reward"):
        score.run(asked, context)


def test_calibration_is_counted_by_hand() -> None:
    """Two bins: 0.6 sure and 1 of 2 right; 0.9 sure and 3 of 3 right, so (2 · 0.1 + 3 · 0.1) / 5."""
    logit = {p: math.log(p / (1 - p)) for p in (0.62, 0.92)}
    told = calibration.described([logit[0.62], -logit[0.62], *[logit[0.92]] * 3])
    assert told["accuracy"] == 0.8
    assert [(one["pairs"], one["accuracy"]) for one in told["bins"]] == [(2, 0.5), (3, 1.0)]
    assert told["expected_calibration_error"] == pytest.approx((2 * 0.12 + 3 * 0.08) / 5)
    tie = calibration.described([0.0])
    assert (tie["accuracy"], tie["expected_calibration_error"]) == (0.0, 0.0)


def test_every_architecture_of_the_tests_has_a_reward_model(tmp_path: Path) -> None:
    """Those of transformers are taken where there are any; the layers are the language model's own."""
    import transformers

    for name in ("LlamaConfig", "ApertusConfig", "Qwen2Config"):
        sizes = {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 30, "pad_token_id": 0, "tie_word_embeddings": True,
        }  # fmt: skip
        causal = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes)).eval()
        one, other, third = (reward_model.of_language_model(causal, tmp_path, seed) for seed in (1, 1, 2))
        assert one.base_model is causal.base_model
        assert torch.equal(one.score.weight, other.score.weight)
        assert not torch.equal(one.score.weight, third.score.weight)
        rows = [[3, 4, 5], [6, 7, 8, 9, 10, 11]]
        together = reward_model.rewards(one.eval(), rows, batch_size=2)
        alone = [reward_model.rewards(one, [row])[0] for row in rows]
        assert together == pytest.approx(alone, abs=1e-5)


def test_the_cost_counts_two_sequences_a_pair(model_folder: Path, pairs_file: Path) -> None:
    given = {"model": Cost(parameters=1e6, vocab_size=400), "data.0.path": Cost(rows=100)}
    found = reward.cost(config(model_folder, pairs_file.with_name("no.jsonl")), given)
    assert found.tokens == 2 * 100 * 2 * 128
