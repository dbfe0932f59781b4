"""In which order the rows of a training are seen, and that a resumed one sees the same rows."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler
from transformers import Trainer

from cordee import files
from cordee.errors import Fault
from cordee.stage import Context
from posttrain.training.settings import TrlConfig

DATA = "data.json"


def steps(rows: int, epochs: float, global_batch_size: int) -> int:
    """Optimizer steps that see each of `rows` rows `epochs` times, the last one filled up."""
    return math.ceil(round(rows * epochs / global_batch_size, 6))


class Order(Sampler[int]):
    """Numbers of rows: a permutation of all of them for each epoch, one after the other, `count` numbers in all.

    A step takes the next `global_batch_size` of them, across the end of an epoch. So every step is whole, and its rows
    depend on neither the number of processes nor on their batches. `Trainer` would end each epoch with a smaller step,
    which several processes fill up with rows that the epoch has had.
    """

    def __init__(
        self, rows: int, count: int, seed: int, *, is_shuffled: bool, by_length: "ByLength | None" = None
    ) -> None:
        """The order in which `count` of `rows` rows are seen; the seed decides where it `is_shuffled`.

        `by_length` sorts the rows of each step.
        """
        self.rows, self.count, self.seed, self.is_shuffled = rows, count, seed, is_shuffled
        self.by_length = by_length

    def __len__(self) -> int:
        """How many numbers there are."""
        return self.count

    def __iter__(self) -> Iterator[int]:
        """The numbers; the same ones each time."""
        return self.by_length.of_steps(self._numbers()) if self.by_length else self._numbers()

    def _numbers(self) -> Iterator[int]:
        for start in range(0, self.count, self.rows):
            drawn = torch.Generator().manual_seed(self.seed + start // self.rows)
            epoch = torch.randperm(self.rows, generator=drawn) if self.is_shuffled else torch.arange(self.rows)
            yield from epoch[: self.count - start].tolist()


@dataclass(frozen=True)
class ByLength:
    """Sorts the rows of each step, the longest first, so that those that share a batch need little padding."""

    lengths: npt.NDArray[np.int64]
    """`[rows]`: tokens of each."""
    step: int
    """Rows of a step."""

    def of_steps(self, numbers: Iterator[int]) -> Iterator[int]:
        """The same rows in each step."""
        while step := list(itertools.islice(numbers, self.step)):
            yield from sorted(step, key=lambda row: -int(self.lengths[row]))


def set_order(
    trainer: Trainer, config: TrlConfig, context: Context, lengths: npt.NDArray[np.int64] | None = None
) -> None:
    """Have whole steps taken over the rows, in an order that the seed decides, or the data's own if asked for.

    Args:
        trainer: takes the steps.
        config: the stage's config.
        context: the seed; is told.
        lengths: `[rows]`: tokens of each, where the rows of a step are sorted by them.
    """
    settings, rows = trainer.args, len(trainer.train_dataset)
    if settings.max_steps <= 0:
        settings.max_steps = steps(rows, settings.num_train_epochs, config.global_batch_size)
    strategy = str(getattr(settings.train_sampling_strategy, "value", settings.train_sampling_strategy))
    if strategy not in ("random", "sequential"):
        context.note(f"train_sampling_strategy {strategy}: which rows a step has depends on the number of processes")
        return
    if rows < config.global_batch_size:
        context.note(f"a step takes {config.global_batch_size} rows of {rows}: it has some more than once")
    count = settings.max_steps * config.global_batch_size
    by_length = None if lengths is None else ByLength(lengths, config.global_batch_size)
    order = Order(rows, count, context.seed, is_shuffled=strategy == "random", by_length=by_length)
    trainer._get_train_sampler = lambda _dataset=None: order  # noqa: SLF001 - the only handle


def require_same_data(digest: str, context: Context, *, is_resumed: bool) -> None:
    """See that a resumed training has the token ids that it began with, whose digest lies beside the resume points.

    Raises:
        Fault: it has others, as where a chat template writes the date.
    """
    file = context.out / "resume" / DATA
    if is_resumed and files.read_json(file) != digest:
        raise Fault(
            "the data has other token ids than when this training began: does the chat template write the date?",
            file=file,
            hint="set the date by chat_template_kwargs, or delete the folder of resume points to begin again",
        )
    if not is_resumed and context.is_main:
        files.write_json(file, digest)
