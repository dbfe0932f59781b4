"""The rows of preference training, in tokens, as a trainer reads them, and how they are collated into batches."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from cordee.errors import UserError
from posttrain.training import shared_prompt
from posttrain.training.scores import Objective
from posttrain.training.sequences import Places, Sequences
from posttrain.training.settings import IGNORED

Ids = npt.NDArray[np.int32]


class PreferenceRows(Dataset[dict[str, Any]]):
    """Rows, each read from the disk when it is asked for, with what the reference model says of its answers."""

    def __init__(self, sequences: Sequences[Any], objective: Objective, longest: int | None, key: str) -> None:
        """Rows of sequences.

        Args:
            sequences: the data.
            objective: names the lists and numbers that a row has.
            longest: tokens of the longest sequence; None: no limit.
            key: the key that errors name.

        Raises:
            UserError: the divergence from the reference can't be measured on them.
        """
        self.sequences, self.objective, self.longest = sequences, objective, longest
        self.reference: npt.NDArray[np.float32] | None = None
        """`[distinct, num_answers]`: sums of log-probabilities under the reference, nats, of the sides, and last of the
        answer to another prompt where there is one."""
        places, self._distinct_of = np.unique(sequences.places, return_inverse=True)
        self.distinct: Sequences[Any] = Sequences(sequences.parts, places, sequences.read)
        """Each sequence once."""
        self._partners = _partners(self, key) if objective.has_kl and len(sequences) else None

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, at: int) -> dict[str, Any]:
        distinct = int(self._distinct_of[at])
        part, place = self.distinct.place(distinct)
        row: dict[str, Any] = {"answers": [self.tokens(distinct, column) for column in range(self.num_answers)]}
        for name in self.objective.columns:
            row[name] = part.items(name, place) if name == "reference_rewards" else part.value(name, place)
        if self.reference is not None:
            row["reference"] = self.reference[distinct]
        return row

    @property
    def num_answers(self) -> int:
        """How many answers are scored of a row: its sides, and that to another prompt where there is one."""
        return len(self.objective.sides) + (self._partners is not None)

    def tokens(self, distinct: int, column: int) -> tuple[Ids, Ids]:
        """The prompt and an answer of a distinct sequence; in the last column the answer may be another prompt's."""
        part, place = self.distinct.place(distinct)
        prompt: Ids = part.items("prompt", place)
        if self._partners is None or column < len(self.objective.sides):
            return prompt, part.items(self.objective.sides[column], place)
        other, place = self.distinct.place(int(self._partners[distinct]))
        answer: Ids = other.items(self.objective.sides[0], place)
        return prompt, answer if self.longest is None else answer[: max(1, self.longest - len(prompt))]

    @cached_property
    def lengths(self) -> Places:
        """`[rows]`: tokens of a row's longest sequence."""
        longest = np.max([self.sequences.lengths(side) for side in self.objective.sides], axis=0)
        found: Places = self.sequences.lengths("prompt") + longest
        return found

    @cached_property
    def column_lengths(self) -> Places:
        """`[distinct, num_answers]`: tokens of each sequence that is scored."""
        found = [self.distinct.lengths("prompt", side) for side in self.objective.sides]
        if self._partners is not None:
            prompts, answers = self.distinct.lengths("prompt"), self.distinct.lengths(self.objective.sides[0])
            whole = prompts + answers[self._partners]
            found.append(whole if self.longest is None else np.minimum(whole, np.maximum(self.longest, prompts + 1)))
        return np.stack(found, axis=1)

    def given_references(self) -> npt.NDArray[np.float64]:
        """`[distinct, num_answers]`: the reference's log-probabilities that the rows bring along, or NaN."""
        found = np.full((len(self.distinct), self.num_answers), np.nan)
        if self.objective.tail_weight is not None:  # they are sums of all tokens
            return found
        for column, name in enumerate(self.reference_columns):
            found[:, column] = self.distinct.floats(name)
        return found

    @property
    def reference_columns(self) -> list[str]:
        """What a row's own log-probabilities under the reference are named, side by side."""
        return [
            "reference_logprob" if side == "completion" else f"{side}_reference_logprob"
            for side in self.objective.sides
        ]


def _partners(rows: PreferenceRows, key: str) -> Places:
    """`[distinct]`: for each sequence another, with another prompt; each of them once.

    Sorted by their prompts, sequences are as far from each other as the largest group that shares one.

    Raises:
        UserError: more than half of them share a prompt.
    """
    count = len(rows.distinct)
    prompts = [_digest(*rows.distinct.place(at)) for at in range(count)]
    _, group, sizes = np.unique(np.array(prompts), return_inverse=True, return_counts=True)
    order, step = np.argsort(group, kind="stable"), int(sizes.max())
    if 2 * step > count:
        problem = f"{step} of {count} answers are to one prompt: KTO measures the divergence on answers to other ones"
        raise UserError(problem, key=key, hint="trainer.loss_type: apo_zero_unpaired does without")
    found = np.empty(count, np.int64)
    found[order] = np.roll(order, -step)
    return found


def _digest(part: Any, place: int) -> bytes:
    return hashlib.blake2b(part.items("prompt", place).tobytes(), digest_size=16).hexdigest().encode()


@dataclass
class Collator:
    """Puts rows into a batch: all first sides, then all second ones, padded behind."""

    pad_token_id: int
    multiple_of: int | None
    """Batches are padded to a multiple of it."""
    objective: Objective
    joins: bool = False
    """Whether the sides of a row are given as one sequence too: see `shared_prompt`."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch.

        Returns:
            `[sides · rows, seq]` each: `input_ids`, `attention_mask`, `labels` (-100: none) and `completion_mask`;
            `reference`, `[sides · rows]`, nats; what the objective's rows tell, `[rows, …]`; and under names that begin
            with `kl_` the same of answers to other prompts, `[rows, …]`.
        """
        sides = len(self.objective.sides)
        columns = [[row["answers"][column] for row in rows] for column in range(len(rows[0]["answers"]))]
        flat = [one for column in columns[:sides] for one in column]
        batch = self.padded(flat, len(rows) if self.objective.has_prompt_loss else 0)
        if self.joins:
            batch |= shared_prompt.joined(columns[:sides], batch["labels"], self.pad_token_id, self.multiple_of)
        if len(columns) > sides:
            batch |= {f"kl_{name}": value for name, value in self.padded(columns[-1]).items()}
        if "reference" in rows[0]:
            found = torch.tensor(np.stack([row["reference"] for row in rows], axis=1))  # [columns, rows]
            batch["reference"] = found[:sides].reshape(-1)
            if len(columns) > sides:
                batch["kl_reference"] = found[-1]
        for name in self.objective.columns:
            batch[name] = _stacked([row[name] for row in rows])
        return batch

    def padded(self, sequences: Sequence[tuple[Ids, Ids]], with_prompt: int = 0) -> dict[str, torch.Tensor]:
        """Prompts, each with an answer; the first `with_prompt` have labels on the prompt too.

        Returns:
            `[sequences, seq]` each, int64: `input_ids`, `attention_mask` (0: padding), `labels` (-100: none) and
            `completion_mask` (1: the answer).
        """
        longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
        if self.multiple_of:
            longest += -longest % self.multiple_of
        shape = len(sequences), longest
        ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORED)
        attention, completion = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, (prompt, answer) in enumerate(sequences):
            begin, end = len(prompt), len(prompt) + len(answer)
            ids[row, :begin], ids[row, begin:end] = torch.tensor(prompt), torch.tensor(answer)
            first = 0 if row < with_prompt else begin
            labels[row, first:end] = ids[row, first:end]
            attention[row, :end] = completion[row, begin:end] = 1
        return {"input_ids": ids, "attention_mask": attention, "labels": labels, "completion_mask": completion}


def _stacked(values: Sequence[Any]) -> torch.Tensor:
    """`[rows]`, float64, or of lists `[rows, longest]`, filled with NaN."""
    if not isinstance(values[0], np.ndarray):
        return torch.tensor(values, dtype=torch.float64)
    found = torch.full((len(values), max(map(len, values))), torch.nan, dtype=torch.float64)
    for row, value in enumerate(values):
        found[row, : len(value)] = torch.tensor(value)
    return found
