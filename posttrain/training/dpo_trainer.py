"""Around TRL's `DPOTrainer`: settings that it would ignore, its dataset, the check of the first step."""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, load_from_disk
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import DPOConfig, DPOTrainer

from cordee import files
from cordee.chat.pairs import TokenPair
from cordee.errors import Fault, UserError, nearest
from posttrain.training.sequences import Sequences
from posttrain.training.settings import CHECKED_BATCHES

SIDES = ("prompt", "chosen", "rejected")
BY_BATCH = {"sft", "aot", "aot_unpaired"}
"""The losses that TRL takes over the tokens or the order of one batch of one process, not pair by pair."""
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}
"""The losses in which TRL reads `label_smoothing`."""


def check_settings(settings: DPOConfig, lora: dict[str, Any] | None) -> None:
    """Refuse settings that TRL would drop without a word, or find out about in the first step only.

    Raises:
        UserError: there is one.
    """
    if lora and lora.get("lora_dropout") and settings.disable_dropout:
        raise UserError(
            "TRL switches every dropout off, this one too, as long as trainer.disable_dropout is true (its default)",
            key="lora.lora_dropout",
            hint="leave it out, or set trainer.disable_dropout: false",
        )
    if lora and lora.get("bias", "none") != "none":
        raise UserError(
            f"with {lora['bias']!r} biases stay trained while the adapter is off: there would be no reference model",
            key="lora.bias",
            hint="leave it out",
        )
    # TRL has no list of its losses; each is a branch of its source.
    known = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer)))
    for name in settings.loss_type:
        if name not in known:
            raise UserError(f"TRL has no loss {name!r}", key="trainer.loss_type", hint=nearest(name, known))
    if settings.sync_ref_model:
        problem = "a reference that is moved during the training is not part of a resume point"
        raise UserError(problem, key="trainer.sync_ref_model", hint="leave it out")
    if settings.label_smoothing and not SMOOTHED.intersection(settings.loss_type):
        raise UserError(
            f"{', '.join(settings.loss_type)} does not read it", key="trainer.label_smoothing",
            hint=f"losses that do: {', '.join(sorted(SMOOTHED))}",
        )  # fmt: skip


class TokenPairTrainer(DPOTrainer):
    """TRL's trainer for pairs that are tokens already: it renders and tokenizes nothing."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def dataset(pairs: Sequences[TokenPair], settings: DPOConfig, folder: Path) -> Dataset:
    """The pairs in the columns that TRL's collator reads: `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Log-probabilities computed beforehand are passed from process to process by a file beside the dataset's own, so
    it has to lie on the disk then: within `folder`, which goes with the resume points, in one that is named by the
    pairs' digest, since a chat template that writes the date gives others tomorrow.
    """

    def rows(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [pairs.place(at) for at in batch["pair"]]
        return {f"{side}_ids": [part.items(side, at).tolist() for part, at in found] for side in SIDES}

    whole = Dataset.from_dict({"pair": range(len(pairs))}).with_transform(rows)
    if not settings.precompute_ref_log_probs:
        return whole
    place = folder / f"pairs-{pairs.digest[:16]}"
    with PartialState().main_process_first():
        if not place.exists():
            written = whole.with_format(None).map(rows, batched=True, remove_columns=["pair"])
            with files.replaced(place, last="dataset_info.json") as beside:
                written.save_to_disk(beside)
    return load_from_disk(place)


def check_batches(trainer: DPOTrainer, pairs: Sequence[TokenPair]) -> None:
    """Look at what the trainer's own collator makes before anything is learnt from it.

    Raises:
        Fault: a batch holds other tokens than the pairs, or compares others than the answers'.
    """
    size, data = trainer.args.per_device_train_batch_size, trainer.train_dataset
    if len(data) != len(pairs):
        raise Fault(f"the trainer holds {len(data)} of {len(pairs)} pairs")
    for start in range(0, min(len(pairs), size * CHECKED_BATCHES), size):
        some = [pairs[at] for at in range(start, min(start + size, len(pairs)))]
        batch = trainer.data_collator([data[at] for at in range(start, start + len(some))])
        sides = [(pair, pair.chosen) for pair in some] + [(pair, pair.rejected) for pair in some]
        for row, (pair, side) in enumerate(sides):
            kept, mask = batch["attention_mask"][row].bool(), batch["completion_mask"][row]
            expected = pair.prompt + side, [0] * len(pair.prompt) + [1] * len(side)
            found = batch["input_ids"][row][kept].tolist(), mask[kept].tolist()
            if found != expected or mask[~kept].any():
                raise Fault("the trainer's batches are not the pairs", file=pair.file, key=f"row {pair.number}")


def counts(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The `tokens` of a batch `[2 · pairs, length]` without padding, and its `pairs`: scalars on the batch's device."""
    mask = batch["attention_mask"]
    return {"tokens": mask.sum(), "pairs": mask.new_tensor(len(mask) // 2)}


def weights(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The pairs of a batch, which its `loss` is a mean over, and the tokens of answers that other figures are."""
    chosen, rejected = (mask.sum() for mask in batch["completion_mask"][:, 1:].chunk(2))
    return {
        "loss": counts(batch)["pairs"],
        "entropy": chosen + rejected,
        "mean_token_accuracy": chosen,
        "logits/chosen": chosen,
        "logits/rejected": rejected,
    }


class StartsAtReference(TrainerCallback):
    """Before its first update the policy *is* the reference: rewards 0, and the sigmoid loss ln 2 (paper's equation 7).

    Where it is not, another reference than the model that was asked for is in use (or an adapter that does not start
    without effect), and everything after would be measured from there.
    """

    def __init__(self, settings: DPOConfig, tolerance: float) -> None:
        """Expect the figures of these settings, to an absolute tolerance: bfloat16 rounds other batches otherwise."""
        self.tolerance = tolerance
        plain = settings.loss_type == ["sigmoid"] and not settings.use_weighting and not settings.loss_weights
        self.expected = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0}
        if plain:
            self.expected["loss"] = math.log(2.0)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any) -> None:  # noqa: ARG002 - the library's signature
        """Check the figures of step 1, which were computed before the first update."""
        if state.global_step != 1 or "loss" not in logs:
            return
        for name, value in self.expected.items():
            if name == "loss" and "aux_loss" in logs:  # that of a model's experts is part of it
                continue
            if not abs(logs[name] - value) <= self.tolerance:
                raise Fault(
                    f"before the first update {name} is {logs[name]:.4g} and not {value:.4g}: the model does not start "
                    "as its reference",
                    hint="an adapter has to start without effect (lora.init_lora_weights), and dropout has to be off",
                )
