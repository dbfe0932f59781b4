"""What DPO refuses in settings and pairs, and that the pairs which were checked are those that the trainer gets."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoding
import pytest
from dpo_samples import config, pair

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


def test_biases_that_would_stay_trained_in_the_reference_are_refused(
    model_folder: Path, pairs_file: Path, context: Context
) -> None:
    with pytest.raises(UserError, match=r"lora\.bias: with 'all' biases stay trained"):
        dpo.run(config(model_folder, pairs_file, lora={"r": 4, "bias": "all"}), context)


def test_a_loss_that_trl_does_not_have_is_refused_by_its_nearest_name(
    model_folder: Path, pairs_file: Path, context: Context
) -> None:
    with pytest.raises(UserError, match=r"trainer\.loss_type: .*did you mean 'sigmoid'"):
        dpo.run(config(model_folder, pairs_file, trainer={"loss_type": ["sigmod"]}), context)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"sync_ref_model": True},
            r"trainer\.sync_ref_model: a reference that is moved .* resume point",
        ),
        ({"label_smoothing": 0.3}, r"trainer\.label_smoothing: sigmoid does not read it; losses that do: aot,"),
    ],
)
def test_what_trl_would_not_do_or_a_resume_would_lose_is_refused(
    model_folder: Path, pairs_file: Path, context: Context, trainer: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        dpo.run(config(model_folder, pairs_file, lora=None, trainer=trainer), context)


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
    from cordee.chat.source import Limits
    from posttrain.training.dpo_trainer import check_batches

    trainer, _ = dpo.build(config(model_folder, pairs_file), context)
    found = encoding.pairs(pairs_file, trainer.processing_class, Limits(128, None, 1000))
    check_batches(trainer, found)
    sound = trainer.data_collator

    def with_mask(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = sound(examples)
        return {**batch, "completion_mask": batch["attention_mask"]}

    trainer.data_collator = with_mask
    with pytest.raises(Fault, match="row 1: the trainer's batches are not the pairs"):
        check_batches(trainer, found)
    trainer.data_collator = lambda examples: sound([{**row, "chosen_ids": row["chosen_ids"][:-1]} for row in examples])
    with pytest.raises(Fault, match="row 1: the trainer's batches are not the pairs"):
        check_batches(trainer, found)
    trainer.data_collator = sound
    with pytest.raises(Fault, match="the trainer holds 24 of 23 pairs"):
        check_batches(trainer, found[:-1])


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
    assert list(trainer.train_dataset[0]) == ["prompt_ids", "chosen_ids", "rejected_ids"]
    prompts = trainer.processing_class.batch_decode([row["prompt_ids"] for row in trainer.train_dataset])
    assert all("Adds two numbers" in prompt for prompt in prompts)
