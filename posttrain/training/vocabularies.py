"""Distillation across vocabularies: where tokens of two tokenizers end at the same byte, and how far models are there.

The distance is that of Boizard et al. 2024 (Universal Logit Distillation, arXiv 2402.12030): between the probabilities
of each model in falling order, whatever tokens they belong to. Tokens that end at the same byte form a group, as in
TRL's GOLD; the chain rule gives the probability of a group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cordee.chat.conversations import Conversation
from cordee.chat.problems import BadRowError, Problems
from cordee.chat.source import Rules, Source
from cordee.chat.spans import Answer
from cordee.chat.tokenized import Tokenized, tokenize
from cordee.compute.model import sequence_limits
from cordee.errors import UserError
from cordee.stage import Context
from posttrain.training.sequences import Sequences, ids_and_labels
from posttrain.training.settings import TrlConfig

NONE = -1
"""The group of a token that has no counterpart."""
OF_ROW = ("teacher_ids", "teacher_groups", "student_groups")
"""What a row holds beside the student's tokens; a batch has `teacher_mask` too."""
Groups = npt.NDArray[np.int64]


def universal_logit_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The sum of |p - q| over the probabilities of both in falling order: `[groups, vocab]` each → `[groups]`."""
    width = max(student.shape[-1], teacher.shape[-1])
    sorted_ones = [
        torch.nn.functional.pad(one.sort(-1, descending=True).values, (0, width - one.shape[-1]))
        for one in (student, teacher)
    ]
    return (sorted_ones[0] - sorted_ones[1]).abs().sum(-1)


def group_probabilities(logits: torch.Tensor, ids: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The distribution at the last token of each group, times the probability of the tokens before it.

    Args:
        logits: `[tokens, vocab]`, those that predict each token.
        ids: the tokens, `[tokens]`.
        groups: their groups, from 0 without a gap, `[tokens]`.

    Returns:
        `[groups, vocab]`, whose rows sum to the probability of the tokens before the last.
    """
    logprobs = logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    own = logprobs.gather(-1, ids[:, None])[:, 0]
    last = torch.cat([groups[1:] != groups[:-1], groups.new_ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    summed = own.new_zeros(len(last)).index_add(0, groups, own)
    return (logprobs[last] + (summed - own[last])[:, None]).exp()


def distances(
    student: torch.Tensor, teacher: torch.Tensor, batch: Mapping[str, Any], temperature: float
) -> torch.Tensor:
    """The distance of each of the student's tokens with a group: `[batch, seq]`, 0 elsewhere.

    Args:
        student: logits, `[batch, seq, vocab]`.
        teacher: logits over its own tokens and vocabulary, `[batch, seq', vocab']`.
        batch: `input_ids` and what `OF_ROW` names.
        temperature: what both are divided by.
    """
    found = []
    for row in range(len(student)):
        sides = []
        for logits, ids, groups in (
            (student, batch["input_ids"], batch["student_groups"]),
            (teacher, batch["teacher_ids"], batch["teacher_groups"]),
        ):
            places = (groups[row] != NONE).nonzero()[:, 0]
            predicted = logits[row, places - 1] / temperature
            sides.append(group_probabilities(predicted, ids[row, places], groups[row, places]))
        apart = universal_logit_distance(*sides)
        own = batch["student_groups"][row]
        found.append(torch.where(own != NONE, apart[own.clamp(min=0)], apart.new_zeros(())))
    return torch.stack(found)


def groups_of(student: Sequence[int], teacher: Sequence[int]) -> tuple[Groups, Groups]:
    """The group of each token of a text, by the lengths of both sides' tokens in bytes."""
    ends = [np.cumsum(lengths) for lengths in (student, teacher)]
    shared = np.intersect1d(ends[0], ends[1])
    return np.searchsorted(shared, ends[0]), np.searchsorted(shared, ends[1])


@dataclass(frozen=True)
class Teaching:
    """The rows of a training as the teacher's tokenizer and chat template give them."""

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase
    parts: tuple[Tokenized, ...]
    """Of each source."""
    places: tuple[dict[tuple[int, int, int], int], ...]
    """Of each source: by file, row and messages, the place of a sequence."""

    @classmethod
    def of(
        cls, config: TrlConfig, sources: Sequence[Source], student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase, model: PreTrainedModel, context: Context,
    ) -> "Teaching":  # fmt: skip
        """Read the sources once more, for the teacher `model`.

        Raises:
            UserError: it can't read a row.
        """
        rules = Rules(sequence_limits(model, None), config.bad_rows, "error", config.earlier_answers)
        cache = context.cache / "sequences"
        parts = tuple(tokenize("chats", teacher, source, rules, context, cache) for source in sources)
        return cls(student, teacher, parts, tuple(map(_places, parts)))

    def row(self, at: int, chats: Sequences[Conversation]) -> dict[str, list[int]]:
        """What a batch holds of a row beside the student's tokens.

        Raises:
            BadRowError: the teacher has no such row, or its answers have other bytes.
        """
        part, place = chats.place(at)
        number = next(number for number, one in enumerate(chats.parts) if one is part)
        ours = part.conversation(place)
        found = self.places[number].get((part.files.index(ours.file), ours.number, ours.messages))
        if found is None:
            raise BadRowError("the teacher's chat template makes other sequences of it")
        theirs = self.parts[number].conversation(found)
        student, teacher = self._groups(ours, theirs)
        return {"teacher_ids": theirs.ids.tolist(), "student_groups": student, "teacher_groups": teacher}

    def _groups(self, ours: Conversation, theirs: Conversation) -> tuple[list[int], list[int]]:
        """The group of each token of both sides, those of one answer after those of the one before."""
        found = [np.full(len(one.ids), NONE) for one in (ours, theirs)]
        before = 0
        for one, other in _answers(ours, theirs):
            spans = [(ours.ids[one.first : one.end], self.student), (theirs.ids[other.first : other.end], self.teacher)]
            said = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids, tokenizer in spans]
            if said[0] != said[1]:
                raise BadRowError("an answer has other bytes in the teacher's chat template", f"{said[1][:40]!r}")
            lengths = [list(map(len, tokenizer.convert_ids_to_tokens(ids.tolist()))) for ids, tokenizer in spans]
            if sum(lengths[0]) != sum(lengths[1]):
                raise BadRowError("an answer holds a token that spells no bytes")
            for groups, where, numbers in zip(found, (one, other), groups_of(*lengths), strict=True):
                groups[where.first : where.end] = numbers + before
            before = int(max(groups.max() for groups in found)) + 1
            if self._ends(one, ours, self.student) and self._ends(other, theirs, self.teacher):
                found[0][one.end], found[1][other.end] = before, before
                before += 1
        return found[0].tolist(), found[1].tolist()

    @staticmethod
    def _ends(answer: Answer, chat: Conversation, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether a token of its own ends an answer."""
        return answer.until > answer.end and int(chat.ids[answer.end]) in tokenizer.added_tokens_decoder


def _places(part: Tokenized) -> dict[tuple[int, int, int], int]:
    """The places of a source's sequences, by their file, row and messages."""
    columns = (part.numbers(name).tolist() for name in ("file", "number", "messages"))
    return {key: at for at, key in enumerate(zip(*columns, strict=True))}


def _answers(ours: Conversation, theirs: Conversation) -> Iterator[tuple[Answer, Answer]]:
    """The answers that carry loss on both sides, in pairs."""
    known = {answer.message: answer for answer in theirs.answers}
    for answer in ours.answers:
        if answer.message not in known:
            raise BadRowError("an answer carries no loss in the teacher's chat template")
        yield answer, known[answer.message]


def require_byte_level(tokenizer: PreTrainedTokenizerBase, folder: Path, key: str) -> None:
    """See that a tokenizer's tokens are bytes, so that those of two can be aligned.

    Raises:
        UserError: they are not.
    """
    own = tokenizer.backend_tokenizer
    if "ByteLevel" not in repr(own.pre_tokenizer) + repr(own.decoder):
        hint = "its answers (eval.generate) teach across all vocabularies"
        raise UserError("its tokenizer is not byte-level, and can't be aligned", file=folder, key=key, hint=hint)


def dataset(chats: Sequences[Conversation], teaching: Teaching) -> Dataset:
    """Sequences as `sequences.dataset` gives them, one in a row, with what the teacher reads.

    Raises:
        UserError: rows can't be aligned.
    """
    problems = Problems()
    for at in range(len(chats)):
        chat = chats[at]
        with problems.of(chat.file, chat.number, ""):
            teaching.row(at, chats)
    if problems.count:
        problems.raise_any(chats[0].file, len(chats))

    def read(batch: dict[str, list[list[int]]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "seq_lengths", *OF_ROW)}
        for (at,) in batch["sequences"]:
            ids, labels = ids_and_labels(*chats.place(at))
            row = {"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)], **teaching.row(at, chats)}
            for name, values in found.items():
                values.append(row[name])
        return found

    return Dataset.from_dict({"sequences": [[at] for at in range(len(chats))]}).with_transform(read)


@dataclass(frozen=True)
class WithTeacher:
    """Collates rows as another collator does, with what the teacher reads beside them."""

    inner: Any
    pad: int
    """Fills the teacher's rows."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """What `inner` makes, and `teacher_ids`, `teacher_mask`, `teacher_groups` `[rows, seq']`, `student_groups`."""
        batch = dict(self.inner([{key: one[key] for key in one if key not in OF_ROW} for one in examples]))
        width = max(len(one["teacher_ids"]) for one in examples)
        batch["teacher_ids"] = _padded([one["teacher_ids"] for one in examples], width, self.pad)
        batch["teacher_mask"] = _padded([[1] * len(one["teacher_ids"]) for one in examples], width, 0)
        batch["teacher_groups"] = _padded([one["teacher_groups"] for one in examples], width, NONE)
        own = batch["input_ids"].shape[1]
        batch["student_groups"] = _padded([one["student_groups"] for one in examples], own, NONE)
        return batch


def _padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> torch.Tensor:
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
