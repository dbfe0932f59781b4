"""Around TRL's `RewardTrainer`: the model with its head, rows that are tokens, checked batches, what is published."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import RewardConfig, RewardTrainer

from cordee import files
from cordee.chat.pairs import TokenPair
from cordee.compute import logprobs
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import Fault, UserError
from posttrain.rewards import reward_model
from posttrain.training import adapter_settings, adapters, calibration, metrics, skeleton, start
from posttrain.training.sequences import Sequences
from posttrain.training.settings import CHECKED_BATCHES, TrlConfig

SIDES = ("chosen", "rejected")
COMPARED = 4
"""Rows on which a merged model is compared with base and adapter."""


class TokenRewardTrainer(RewardTrainer):
    """TRL's trainer for pairs that are tokens already: it renders and tokenizes nothing."""

    aux_loss_enabled = False
    """As in TRL's other trainers: no loss of experts is added."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def check_settings(settings: RewardConfig, config: TrlConfig) -> None:
    """Refuse settings that TRL would drop without a word, or that no whole model comes of.

    Raises:
        UserError: there is one.
    """
    adapter_settings.require_dropout(config.lora, is_disabled=settings.disable_dropout)
    if config.quantization is not None:
        problem = "a reward model is published whole, and an adapter does not fit exactly into quantized weights"
        raise UserError(problem, key="quantization", hint="leave it out")


def open_model(config: TrlConfig, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A reward model to train on, or a language model (with its adapter merged) that is given a head by the seed.

    Raises:
        UserError: `model` is neither, or a key does not fit it.
        Fault: it is damaged.
    """
    if not reward_model.is_reward_model(config.model):
        causal, tokenizer = skeleton.open_model(config)
        if isinstance(causal, PeftModel):
            problem = "is an adapter of a language model, which has no head for rewards to train on"
            raise UserError(problem, file=config.model, key="adapter", hint="`adapter: new` merges it first")
        return reward_model.of_language_model(causal, config.model, seed), tokenizer
    if config.added_tokens:
        problem = "a reward model that is trained on keeps its tokens"
        raise UserError(problem, key="added_tokens", hint="leave it out")
    reward_model.require(config.model, "model")
    model = start.open_base(config, config.model, AutoModelForSequenceClassification)
    model.get_input_embeddings().padding_idx = None
    return model, open_tokenizer(start.find(config).tokenizer, key="model")


def dataset(pairs: Sequences[TokenPair]) -> Dataset:
    """The pairs in the columns that TRL's collator reads: `chosen_ids` and `rejected_ids`, each with its prompt."""

    def rows(batch: dict[str, list[int]]) -> dict[str, list[list[int]]]:
        found = [pairs.place(at) for at in batch["pair"]]
        prompts = [part.items("prompt", at).tolist() for part, at in found]
        return {
            f"{side}_ids": [
                prompt + part.items(side, at).tolist() for prompt, (part, at) in zip(prompts, found, strict=True)
            ]
            for side in SIDES
        }

    return Dataset.from_dict({"pair": range(len(pairs))}).with_transform(rows)


def check_batches(trainer: Trainer, pairs: Sequence[TokenPair]) -> None:
    """Look at what the trainer's own collator makes before anything is learnt from it.

    Raises:
        Fault: a batch holds other tokens than the pairs, or in another order.
    """
    size, data = trainer.args.per_device_train_batch_size, trainer.train_dataset
    if len(data) != len(pairs):
        raise Fault(f"the trainer holds {len(data)} of {len(pairs)} pairs")
    for first in range(0, min(len(pairs), size * CHECKED_BATCHES), size):
        some = [pairs[at] for at in range(first, min(first + size, len(pairs)))]
        batch = trainer.data_collator([data[at] for at in range(first, first + len(some))])
        sides = [(pair, pair.chosen) for pair in some] + [(pair, pair.rejected) for pair in some]
        if len(batch["input_ids"]) != len(sides):
            raise Fault(f"a batch of {len(some)} pairs has {len(batch['input_ids'])} rows")
        for row, (pair, side) in enumerate(sides):
            kept = batch["attention_mask"][row].bool()
            if batch["input_ids"][row][kept].tolist() != pair.prompt + side:
                raise Fault("the trainer's batches are not the pairs", file=pair.file, key=f"row {pair.number}")


def reads_before_the_end(trainer: Trainer) -> bool:
    """Whether the token that rows are filled up with ends the first pair's answers too: the head reads before it."""
    pad = trainer.model.config.get_text_config().pad_token_id
    return any(trainer.train_dataset[0][f"{side}_ids"][-1] == pad for side in SIDES)


def weights(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The pairs of a batch, which its `loss` and TRL's other figures are means over: scalars, int64."""
    pairs = metrics.counted(len(SIDES), batch)["pairs"]
    return dict.fromkeys(("loss", "accuracy", "margin", "mean_reward"), pairs)


def save(trainer: Trainer, config: TrlConfig, folder: Path) -> None:
    """Write the whole reward model, an adapter merged into it, and how it does on pairs that are held out."""
    named = skeleton.gathered(trainer)
    if trainer.accelerator.is_main_process:
        model, found = trainer.accelerator.unwrap_model(trainer.model), start.find(config)
        where = {"base": found.base, "tokenizer": found.tokenizer}
        if isinstance(model, PeftModel):
            _save_merged(trainer, model, config, folder, named)
        else:
            reward_model.save(model, folder, **where, state_dict=named)
    if trainer.eval_dataset is not None:
        margins = calibration.margins(trainer)
        if trainer.accelerator.is_main_process:
            files.write_json(folder / calibration.NAME, calibration.described(margins))
    trainer.accelerator.wait_for_everyone()


def _save_merged(
    trainer: Trainer, model: PeftModel, config: TrlConfig, folder: Path, named: dict[str, torch.Tensor]
) -> None:
    """Write what base and adapter are together, opened anew on the CPU, and see that the rewards stay the same.

    Raises:
        Fault: they don't.
    """
    place = Path(trainer.args.output_dir) / "adapter"
    shutil.rmtree(place, ignore_errors=True)
    model.save_pretrained(place, state_dict=named, save_embedding_layers=False, selected_adapters=[adapters.NAME])
    base, _ = open_model(config, trainer.args.seed)
    base.config.get_text_config().pad_token_id = model.config.get_text_config().pad_token_id
    adapted = PeftModel.from_pretrained(base, str(place), local_files_only=True).eval()
    rows = trainer.train_dataset[: min(COMPARED, len(trainer.train_dataset))]["chosen_ids"]
    apart = reward_model.rewards(adapted, rows)
    merged, found = adapters.merge(adapted), start.find(config)
    reward_model.save(merged, folder, base=found.base, tokenizer=found.tokenizer)
    together = reward_model.rewards(reward_model.open_reward_model(folder).eval(), rows)
    limit = logprobs.MERGE_LIMIT[str(merged.dtype).removeprefix("torch.")]
    largest = max(abs(one - other) / max(1.0, abs(one)) for one, other in zip(apart, together, strict=True))
    if not largest <= limit:
        raise Fault(f"merged, rewards differ from base and adapter by {largest:.3g}, more than {limit:g}", file=folder)
    shutil.rmtree(place)
