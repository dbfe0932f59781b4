"""Rows that hold a benchmark's question, as the Apertus report finds them (arXiv 2509.14233, section 4.1.2).

First any eight tokens in a row that a question has as well; then, of the questions that share some, the
Ratcliff-Obershelp matching of their tokens with the row's. Overlaps of fewer than five tokens do not count; a row is
contaminated where the others make up more than half of a question. A question that was reworded or put in another
language is found by what stayed the same of it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

import numpy as np
import numpy.typing as npt

from posttrain.mixing.minhash import mixed

NGRAM, SHORTEST, SHARE = 8, 5, 0.5
"""Tokens in a row that are looked for; tokens of the shortest overlap that counts; the share of a question above which
a row is contaminated."""
COMMON, COMMON_FROM = 0.1, 20
"""Eight tokens that more than this share of a task's questions have are its own wording and no sign of one of them; of
tasks with at least so many questions."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Question:
    """A question of a benchmark."""

    task: str
    text: str
    tokens: tuple[int, ...]
    counts: Counter[int] = field(init=False, compare=False)
    """How often each token stands in it."""

    def __post_init__(self) -> None:
        """Count the tokens."""
        object.__setattr__(self, "counts", Counter(self.tokens))


@dataclass(frozen=True)
class Match:
    """A question that stands in a row."""

    question: Question
    share: float
    """Of its tokens, in overlaps of at least `SHORTEST`."""


class Questions:
    """The questions of all benchmarks, found by their n-grams; memory holds 16 bytes for each token of a question."""

    def __init__(self, questions: Sequence[Question]) -> None:
        """Index the questions."""
        self.questions = questions
        grams = [ngrams(question.tokens) for question in questions]
        counts = np.array([len(found) for found in grams], np.int64)
        self.too_short = Counter(one.task for one, count in zip(questions, counts, strict=True) if not count)
        """How many questions of each task have fewer than `NGRAM` tokens: they can't be found."""
        owners = np.repeat(np.arange(len(questions)), counts)
        hashes = np.concatenate(grams) if grams else np.zeros(0, np.uint64)
        hashes, owners = self._without_common(hashes, owners)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._owners = hashes[order], owners[order]

    def _without_common(self, hashes: npt.NDArray[np.uint64], owners: Tokens) -> tuple[npt.NDArray[np.uint64], Tokens]:
        """The n-grams of each question without those that are its task's own wording."""
        of_task = Counter(question.task for question in self.questions)
        numbers = {task: number for number, task in enumerate(of_task)}
        tasks = np.array([numbers[question.task] for question in self.questions], np.int64)
        kept = np.ones(len(hashes), bool)
        for task, count in of_task.items():
            if count < COMMON_FROM:
                continue
            (own,) = np.nonzero(tasks[owners] == numbers[task])
            pairs = np.unique(np.stack([hashes[own], owners[own].astype(np.uint64)], 1), axis=0)  # once a question
            values, questions = np.unique(pairs[:, 0], return_counts=True)
            common = values[questions > max(1, COMMON * count)]
            kept[own[np.isin(hashes[own], common)]] = False
        return hashes[kept], owners[kept]

    def find(self, tokens: Sequence[int]) -> Match | None:
        """The question that a row holds; of several, one of those that it shares most n-grams with.

        Args:
            tokens: of the row, `[seq]`.
        """
        grams = np.unique(ngrams(tokens))
        first = np.searchsorted(self._hashes, grams, "left")
        last = np.searchsorted(self._hashes, grams, "right")
        hits = [self._owners[first[at] : last[at]] for at in np.flatnonzero(last > first)]
        if not hits:
            return None
        there = Counter(tokens)
        matcher: SequenceMatcher[int] = SequenceMatcher(None, (), tokens, autojunk=False)
        for number, _ in Counter(np.concatenate(hits).tolist()).most_common():
            question = self.questions[number]
            least = SHARE * len(question.tokens)
            if sum(min(count, there[token]) for token, count in question.counts.items()) <= least:
                continue
            matcher.set_seq1(question.tokens)
            overlap = sum(block.size for block in matcher.get_matching_blocks() if block.size >= SHORTEST)
            if overlap > least:
                return Match(question, overlap / len(question.tokens))
        return None


def ngrams(tokens: Sequence[int]) -> npt.NDArray[np.uint64]:
    """`[seq - NGRAM + 1]`: hashes of each `NGRAM` tokens in a row."""
    numbers = mixed(np.array(tokens, np.uint64) + np.uint64(1))
    count = max(0, len(numbers) - NGRAM + 1)
    found = np.zeros(count, np.uint64)
    for place in range(NGRAM):
        found = found * _BASE + numbers[place : place + count]
    return mixed(found)
