"""What is read, and what becomes of rows that can't be used or are too long."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import Field

from cordee.chat.problems import BadRowError, OverlongRowError
from cordee.config import Config, Input

Of: TypeAlias = Literal["chats", "pairs", "labelled", "scored", "prompts"]
"""What rows have to be: chats, preference pairs, answers that are good or bad, answers with a reward, prompts."""
BadRows: TypeAlias = Literal["error", "drop"]
Overlong: TypeAlias = Literal["error", "drop", "truncate", "cut"]
EarlierAnswers: TypeAlias = Literal["own_row", "skip"]


class Source(Config):
    """One file of rows, or one folder of such files."""

    path: Input
    """Parquet, Arrow, JSON lines, JSON, CSV or TSV, plain or compressed; a folder of such files; or a data set saved by
    `datasets`."""
    files: list[str] | None = Field(default=None, min_length=1)
    """Patterns below a folder, such as `train/*.parquet`, that name the files to read."""
    split: str | None = None
    """Which split of a folder is read; `train` if not given and there are several."""
    subset: str | None = None
    """Which subset of a folder is read, where its README names several (`main`)."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns to rename, such as `{question: prompt, answer: completion}`."""
    ignore: list[str] = Field(default_factory=list)
    """Columns and keys of messages that are left out, though they hold something that the chat template can't use."""
    as_text: bool = False
    """Whether prompts and answers that are strings are joined as they stand, as TRL does it; otherwise they become the
    turns of a chat, where the model has a chat template."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many rows are read: the first, or with `shuffle` drawn from all; at least 1."""
    shuffle: bool = False
    """Whether `limit` draws its rows from all of them, by the recipe's seed."""
    weight: float = Field(default=1.0, gt=0)
    """How often each row is seen per epoch: 0.5 takes a random half of them, 2 all of them twice; above 0."""


@dataclass(frozen=True)
class Limits:
    """What the longest sequence and the largest token id may be."""

    max_length: int | None
    """Tokens that `max_length` allows; None where it sets no limit."""
    positions: int | None
    """Positions of the model; None where it has no limit."""
    vocab_size: int
    """Rows of the model's input embedding."""

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence; None where there is no limit."""
        return min((limit for limit in (self.max_length, self.positions) if limit is not None), default=None)

    def check(self, ids: Sequence[int]) -> None:
        """See that a sequence fits.

        Raises:
            BadRowError: it is too long, or holds an id beyond the model's embedding.
        """
        self.check_ids(ids)
        if self.longest is not None and len(ids) > self.longest:
            raise self.overlong(len(ids))

    def check_ids(self, ids: Iterable[int]) -> None:
        """See that a sequence's ids are the model's.

        Raises:
            BadRowError: one is beyond its embedding.
        """
        if (largest := max(ids, default=0)) >= self.vocab_size:
            problem = f"a token id beyond the {self.vocab_size} rows of the model's embedding: is it its tokenizer?"
            raise BadRowError(problem, f"id {largest}")

    def overlong(self, tokens: int, but: str = "") -> OverlongRowError:
        """The error of a sequence of so many tokens, which are too many."""
        is_ours = self.longest == self.max_length
        hint = f"{'raise it, or ' if is_ours else ''}`overlong: drop`, `truncate` or `cut` settles it"
        what = f"max_length={self.max_length} tokens" if is_ours else f"the model's {self.positions} positions"
        told = f"longer than {what}" + (f", and {but}" if but else "")
        return OverlongRowError(told, f"{tokens} tokens", hint)


@dataclass(frozen=True)
class Rules:
    """How rows become sequences."""

    limits: Limits
    bad_rows: BadRows = "error"
    """Rows that can't be used: an error, or left out and counted."""
    overlong: Overlong = "error"
    """Rows that are too long: an error, left out and counted, truncated behind the last answer that fits, or cut."""
    earlier_answers: EarlierAnswers = "own_row"
    """Answers rendered differently when messages follow: a sequence of their own, or not trained."""
