"""Around TRL's `SFTTrainer`: a frozen teacher beside the student, their divergence as the loss, on-policy samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from trl.models.utils import unwrap_model_for_generation

from cordee import model_folder
from cordee.chat.conversations import Conversation
from cordee.compute import adapter
from cordee.compute.tokenizer import difference, open_tokenizer
from cordee.errors import Fault, UserError
from cordee.seeds import seed_of
from posttrain.training import divergence, masks, sampling, vocabularies
from posttrain.training.sequences import Sequences
from posttrain.training.settings import IGNORED
from posttrain.training.sft_trainer import TokenTrainer

Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]
MEASURED = ("divergence", "cross_entropy", "entropy", "mean_token_accuracy")
"""What is logged beside the loss: means over the tokens with loss."""


@dataclass(frozen=True)
class DistillSettings:
    """What the student learns of the teacher, and on which completions."""

    beta: float
    temperature: float
    cross_entropy: float
    """The weight of the cross-entropy."""
    on_policy: float
    """The share of the steps in which the student's own completions stand in the place of the data's."""
    max_new_tokens: int
    sampling_temperature: float
    stops: tuple[int, ...]
    """Ids that end a completion."""
    seed: int


class DistillTrainer(TokenTrainer):
    """TRL's trainer with the loss of distillation."""

    def __init__(self, *args: Any, teacher: PreTrainedModel, distill_settings: DistillSettings, **given: Any) -> None:
        """As TRL's, and with a teacher, which is frozen."""
        super().__init__(*args, **given)
        self.teacher = self.accelerator.prepare_model(teacher.requires_grad_(False).eval(), evaluation_mode=True)
        self.settings = distill_settings
        self.aux_loss_enabled = False  # a router's loss is no part of what a teacher tells

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the tokens with loss, of the whole step where their number is given."""
        if return_outputs:
            raise NotImplementedError
        mask = inputs["labels"][:, 1:] != IGNORED
        losses, measured = (self._across if "teacher_ids" in inputs else self._same)(model, inputs, mask)
        count = mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients
        self._measure(inputs, mask, measured)
        return loss

    def _same(self, model: Any, inputs: Mapping[str, Any], mask: torch.Tensor) -> Losses:
        """The loss of each token with loss, where teacher and student have one vocabulary."""
        passed = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
        with torch.no_grad():
            teacher = self.teacher(**passed, use_cache=False).logits[:, :-1][mask]
        student = model(**passed, use_cache=False).logits[:, :-1][mask]
        width = min(student.shape[-1], teacher.shape[-1])  # tables may be padded differently
        return divergence.mixed(
            student[:, :width], teacher[:, :width], inputs["labels"][:, 1:][mask], beta=self.settings.beta,
            temperature=self.settings.temperature, cross_entropy_weight=self.settings.cross_entropy,
        )  # fmt: skip

    def _across(self, model: Any, inputs: Mapping[str, Any], mask: torch.Tensor) -> Losses:
        """The loss of each token with loss, where they have two."""
        with torch.no_grad():
            read = {"input_ids": inputs["teacher_ids"], "attention_mask": inputs["teacher_mask"]}
            teacher = self.teacher(**read, use_cache=False).logits
        passed = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        student = model(**passed, use_cache=False).logits
        apart = vocabularies.distances(student, teacher, inputs, self.settings.temperature)[:, 1:][mask]
        targets = inputs["labels"][:, 1:][mask]
        return divergence.with_cross_entropy(apart, student[:, :-1][mask], targets, self.settings.cross_entropy)

    def _measure(self, inputs: Mapping[str, Any], mask: torch.Tensor, measured: Mapping[str, torch.Tensor]) -> None:
        """Add the means over a batch of all processes to what TRL logs."""
        mode = "train" if self.model.training else "eval"
        sums = torch.stack([mask.sum().float(), *(measured[name].sum().float() for name in MEASURED)])
        tokens, *rest = self.accelerator.reduce(sums, "sum").tolist() if mode == "train" else sums.tolist()
        for name, total in zip(MEASURED, rest, strict=True):
            self._metrics[mode][name].append(total / max(tokens, 1.0))
        if mode == "train":
            self._total_train_tokens += int(self.accelerator.reduce(masks.counts(inputs)["tokens"], "sum"))
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The batches of a step; of one that is on-policy, with completions that the student samples now."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches or not is_on_policy(self.settings, self.state.global_step):
            return batches, count
        batches = [self._sampled(batch, number) for number, batch in enumerate(batches)]
        return batches, self._get_num_items_in_batch(batches, device)

    def _sampled(self, batch: Mapping[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
        """A batch with the student's completions in the place of each row's last answer."""
        prompts = [prompt(ids, labels) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
        at = (
            number * self.accelerator.num_processes + self.accelerator.process_index
        ) * self.args.per_device_train_batch_size
        seeds = [seed_of(self.settings.seed, self.state.global_step, at + row) for row in range(len(prompts))]
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            how = sampling.SamplingSettings(self.settings.sampling_temperature, self.settings.max_new_tokens)
            said = sampling.sample(model, prompts, seeds, self.settings.stops, self.processing_class.pad_token_id, how)
        rows = []
        for asked, one in zip(prompts, said, strict=True):
            ids, labels = asked + one.ids, [IGNORED] * len(asked) + one.ids
            rows.append({"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)]})
        found: dict[str, torch.Tensor] = self.data_collator(rows)
        return found


def is_on_policy(settings: DistillSettings, step: int) -> bool:
    """Whether the student's own completions are learnt from in a step (counted from 0); the same in all processes."""
    return bool(np.random.default_rng((settings.seed, step)).random() < settings.on_policy)


def prompt(ids: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """The token ids of a row up to its last answer: ids and labels `[seq]`, which padding may follow."""
    start = int((labels != IGNORED).nonzero()[-1])
    while start and labels[start - 1] != IGNORED:
        start -= 1
    found: list[int] = ids[:start].tolist()
    return found


def weights(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tokens with loss of a batch, which its `loss` and all other figures are means over: scalars, int64."""
    return dict.fromkeys(("loss", *MEASURED), masks.counts(batch)["loss_tokens"])


def open_teacher(folder: Path, student: Path, *, across: bool) -> PreTrainedModel:
    """The teacher, as it is stored, whose tokens are those of the student's tokenizer.

    Args:
        folder: of the teacher, a model or an adapter.
        student: the folder of the student's tokenizer.
        across: whether its tokens may be others, which have to be bytes then.

    Raises:
        UserError: it is no model, or its tokens are others.
        Fault: it is damaged.
    """
    model_folder.require_served(folder, "teacher")
    own = model_folder.tokenizer_of(folder)
    if across:
        for place, key in ((own, "teacher"), (student, "model")):
            vocabularies.require_byte_level(open_tokenizer(place), place, key)
        return adapter.open_served(folder)
    theirs, ours = open_tokenizer(own, key="teacher").get_vocab(), open_tokenizer(student).get_vocab()
    problem = "" if theirs == ours else _differing(theirs, ours)
    if problem := problem or difference(own, student):
        hint = (
            "`across_vocabularies: true` compares sorted probabilities, as trl.experimental.gold does; "
            "or train on its answers (eval.generate, posttrain.sft)"
        )
        raise UserError(f"its vocabulary is not the student's: {problem}", file=folder, key="teacher", hint=hint)
    return adapter.open_served(folder)


def _differing(theirs: Mapping[str, int], ours: Mapping[str, int]) -> str:
    """In how many tokens two vocabularies differ, and one of them."""
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    return f"{len(names)} tokens differ, such as {names[0]!r}"


def require_prompts(chats: Sequences[Conversation], settings: DistillSettings, positions: int | None) -> None:
    """See that each row has a prompt, and positions are left for a completion of it.

    Raises:
        UserError: the student can't be asked.
    """
    if not settings.on_policy:
        return
    longest = 0
    for at in range(len(chats)):
        part, place = chats.place(at)
        start = int(part.items("loss", at=place).reshape(-1, 2)[-1][0])
        if start <= 1:  # what begins a sequence asks nothing
            row = chats[at]
            problem = f"row {row.number} is a text without a prompt, which the student can't be asked"
            raise UserError(problem, file=row.file, key="on_policy", hint="`columns: {yours: prompt, …}`, or 0")
        longest = max(longest, start)
    if positions is not None and longest + settings.max_new_tokens > positions:
        problem = f"the longest prompt has {longest} tokens, and the model {positions} positions"
        raise UserError(problem, key="max_new_tokens", hint=f"at most {positions - longest}")


def check_prompts(trainer: DistillTrainer, chats: Sequence[Conversation]) -> None:
    """See that the prompts which the student is asked are those of the data, before anything is learnt.

    Raises:
        Fault: one ends elsewhere than where the last answer begins.
    """
    if not trainer.settings.on_policy:
        return
    size = min(trainer.args.per_device_train_batch_size, len(chats))
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(size)])
    for ids, labels, chat in zip(batch["input_ids"], batch["labels"], chats, strict=False):
        if prompt(ids, labels) != chat.ids[: chat.answers[-1].first].tolist():
            raise Fault("the student is asked another prompt than the chat's", file=chat.file, key=f"row {chat.number}")
