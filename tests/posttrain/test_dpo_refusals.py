"""What DPO refuses in settings and pairs, and that the pairs which were checked are those that the trainer gets."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_samples import config, pair

from cordee.config import libraries
from cordee.errors import Fault, UserError
from cordee.stage import Context
from posttrain import dpo


def test_an_adapter_that_does_not_start_without_effect_is_a_fault(
    model_folder: Path, pairs_file: Path, new_context: Callable[[str], Context]
) -> None:
    context = new_context("random")
    asked = config(model_folder, pairs_file, lora={"r": 4, "init_lora_weights": False})
    with pytest.raises(Fault, match="does not start as its reference"):
        dpo.run(asked, context)
    assert not (context.out / "adapter_config.json").exists()


def test_a_dropout_that_trl_would_switch_off_is_refused(model_folder: Path, pairs_file: Path, context: Context) -> None:
    with pytest.raises(UserError, match=r"lora\.lora_dropout: .*disable_dropout"):
        dpo.run(config(model_folder, pairs_file, lora={"r": 4, "lora_dropout": 0.1}), context)


def test_biases_that_stay_trained_move_no_reference(model_folder: Path, pairs_file: Path, context: Context) -> None:
    """It is computed before the first step."""
    metrics = dpo.run(config(model_folder, pairs_file, lora={"r": 4, "bias": "all"}), context)
    assert metrics["rewards/accuracies"] == 1.0


def test_a_loss_that_trl_does_not_have_is_refused_by_its_nearest_name(
    model_folder: Path, pairs_file: Path, context: Context
) -> None:
    with pytest.raises(UserError, match=r"trainer\.loss_type: .*did you mean 'sigmoid'"):
        dpo.run(config(model_folder, pairs_file, trainer={"loss_type": ["sigmod"]}), context)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"label_smoothing": 0.3}, r"trainer\.label_smoothing: sigmoid does not read it; losses that do: aot,"),
        ({"loss_type": ["exo_pair"]}, r"trainer\.label_smoothing: has to be above 0 with exo_pair"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, r"trainer\.label_smoothing: must be from 0 to below 0\.5"),
        (
            {"loss_type": ["aot"], "use_weighting": True},
            r"use_weighting: does not apply to aot, which re-pairs",
        ),
        ({"ld_alpha": 1.5}, r"trainer\.ld_alpha: must be from 0 to 1, not 1\.5"),
        ({"discopop_tau": 0.1}, r"trainer\.discopop_tau: sigmoid does not read it"),
        ({"f_divergence_type": "reverse"}, r"trainer\.f_divergence_type: unknown value 'reverse'.*'reverse_kl'"),
        (
            {"loss_type": ["sigmoid", "aot"], "f_divergence_type": "forward_kl"},
            r"trainer\.f_divergence_type: does not apply to aot, which is not a function",
        ),
        ({"f_alpha_divergence_coef": 0.2}, r"f_alpha_divergence_coef: f_divergence_type reverse_kl does not read it"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, r"trainer: DPOConfig refuses it: .*loss_weights"),
        ({"beta": 0.0}, r"trainer\.beta: must be above 0, not 0"),
    ],
)
def test_settings_that_would_have_no_effect_or_no_meaning_are_refused(
    model_folder: Path, pairs_file: Path, context: Context, trainer: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        dpo.run(config(model_folder, pairs_file, lora=None, trainer=trainer), context)


@pytest.mark.parametrize("name", ["precompute_ref_log_probs", "sync_ref_model", "padding_free", "use_liger_kernel"])
def test_what_the_stage_always_does_or_never_is_refused_before_it_starts(name: str) -> None:
    assert name in dict(libraries(dpo.Config))["trainer"].owned


def test_an_adapter_of_rank_0_is_refused(model_folder: Path, pairs_file: Path, context: Context) -> None:
    with pytest.raises(UserError, match="lora: TRL refuses it"):
        dpo.run(config(model_folder, pairs_file, lora={"r": 0}), context)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    import torch

    from posttrain.training.skeleton import trainable_parameters

    model = torch.nn.Linear(2, 3)
    assert trainable_parameters(model) == 9
    with pytest.raises(UserError, match="nothing to train"):
        trainable_parameters(model.requires_grad_(False))


def test_a_batch_that_the_processes_cannot_share_is_refused(
    model_folder: Path, pairs_file: Path, context: Context
) -> None:
    with pytest.raises(UserError, match="global_batch_size"):
        dpo.run(config(model_folder, pairs_file, global_batch_size=6), context)


def broken(column: str, content: str) -> dict[str, Any]:
    row = pair(1)
    return {**row, column: [{**row[column][0], "content": content}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**pair(1), "rejected": pair(1)["chosen"]}, "are equal"),
        ({**pair(1), "chosen": []}, "chosen is empty"),
        (broken("rejected", "  "), r"an answer has no content \(rejected, message 1\)"),
        ({"prompt": pair(1)["prompt"], "chosen": pair(1)["chosen"], "rejectd": 1}, "columns: {rejectd: rejected}"),
        (broken("prompt", "word " * 300), "longer than max_length=128 tokens"),
        (broken("chosen", "German<|assistant_end|>"), "spells out the special token"),
        ({**pair(1), "prompt": [*pair(1)["prompt"], *pair(1)["chosen"]]}, "nothing to answer"),
        ({**pair(1), "chosen": pair(1)["prompt"]}, "ends with 'user'"),
        ({**pair(1), "tools": [{"name": "add"}]}, "has tools, which the chat template does not read"),
        ({**pair(1), "prompt": 3}, "no text and no list of messages"),
    ],
)
def test_a_pair_that_would_train_the_wrong_thing_stops_the_run_by_file_and_row(
    model_folder: Path, tmp_path: Path, context: Context, row: dict[str, Any], message: str
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(pair(0)) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message) as error:
        dpo.run(config(model_folder, file), context)
    assert f"{file}: row 2" in str(error.value)
    assert not (context.out / "metrics.jsonl").exists()


def test_a_collator_that_makes_other_batches_than_the_pairs_is_a_fault(
    model_folder: Path, pairs_file: Path, context: Context
) -> None:
    from posttrain.training.preference import check_batches

    trainer, _ = dpo.build(config(model_folder, pairs_file), context)
    rows = trainer.train_dataset
    check_batches(trainer, rows)
    sound = trainer.data_collator

    def with_mask(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = sound(examples)
        return {**batch, "completion_mask": batch["attention_mask"]}

    def without_a_label(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = sound(examples)
        return {**batch, "labels": batch["labels"].roll(1, 0)}

    def cut(examples: list[dict[str, Any]]) -> dict[str, Any]:
        shorter = [[(prompt, answer[:-1]) for prompt, answer in row["answers"]] for row in examples]
        return sound([row | {"answers": answers} for row, answers in zip(examples, shorter, strict=True)])

    for planted in (with_mask, without_a_label, cut):
        trainer.data_collator = planted
        with pytest.raises(Fault, match="row 1: the trainer's batches are not the rows"):
            check_batches(trainer, rows)
    trainer.data_collator = sound
    trainer.train_dataset = [rows[at] for at in range(23)]
    with pytest.raises(Fault, match="the trainer holds 23 of 24 rows"):
        check_batches(trainer, rows)


def test_pairs_reach_the_trainer_with_their_tools(model_folder: Path, tmp_path: Path, context: Context) -> None:
    """TRL's columns hold what was checked: nothing is rendered a second time."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    template = folder / "chat_template.jinja"
    text = template.read_text().replace("{{- bos_token }}", "{{- bos_token }}{{- tools | tojson if tools else '' }}")
    template.write_text(text)
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds two numbers"}}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({**pair(n), "tools": tools}) + "\n" for n in range(8)))
    trainer, _ = dpo.build(config(folder, file), context)
    rows = [trainer.train_dataset[at] for at in range(8)]
    prompts = trainer.processing_class.batch_decode([row["answers"][0][0].tolist() for row in rows])
    assert all("Adds two numbers" in prompt for prompt in prompts)
