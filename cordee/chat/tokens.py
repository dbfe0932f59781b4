"""Chats and pairs in tokens: rendered once, masked once, checked against the model that will read them."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cordee.chat import schema
from cordee.chat.formats import BadRowError, Problems, read
from cordee.chat.schema import Chat, Pair
from cordee.chat.spans import (
    OTHERWISE,
    Answer,
    Ids,
    Mask,
    Rendering,
    common_length,
    context_of,
    locate,
    loss_mask,
    render,
    require_written,
)
from cordee.chat.templates import Template

BATCH_ROWS = 1000
Note = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """What the longest sequence and the largest token id may be."""

    max_length: int
    """Tokens that `trainer.max_length` allows."""
    positions: int | None
    """Positions of the model; None where it has no limit."""
    vocab_size: int
    """Rows of the model's input embedding."""

    def check(self, ids: Sequence[int]) -> None:
        """See that a sequence fits.

        Raises:
            BadRowError: it does not.
        """
        if len(ids) > self.max_length:
            problem = f"longer than trainer.max_length={self.max_length} tokens: nothing is cut off in silence"
            raise BadRowError(problem, f"{len(ids)} tokens", "raise it, or leave these rows out")
        if self.positions is not None and len(ids) > self.positions:
            raise BadRowError(f"longer than the model's {self.positions} positions", f"{len(ids)} tokens")
        if (largest := max(ids, default=0)) >= self.vocab_size:
            problem = f"a token id beyond the {self.vocab_size} rows of the model's embedding: is it its tokenizer?"
            raise BadRowError(problem, f"id {largest}")


@dataclass(frozen=True)
class Conversation:
    """A chat in tokens, or its beginning up to an answer that the whole chat renders otherwise."""

    file: Path
    number: int
    """Its row in the file, from 1."""
    messages: int
    """How many of the row's messages it holds."""
    ids: Ids
    """`[seq]`, int32."""
    has_loss: Mask
    """`[seq]`, bool."""
    answers: tuple[Answer, ...]
    """The answers that carry loss here."""


@dataclass(frozen=True)
class TokenPair:
    """A preference pair in tokens: the prompt, which ends where the assistant begins, and either answer after it."""

    file: Path
    number: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """Tokens that one pass over the pair reads: the prompt stands before either side."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def conversations(
    file: Path, template: Template, limits: Limits, note: Note, ignore: Collection[str] = ()
) -> list[Conversation]:
    """A file's chats in tokens.

    Args:
        file: rows with `messages`.
        template: the tokenizer's chat template.
        limits: what the model and the settings allow.
        note: told what is not as one might expect, and is no error.
        ignore: columns and message keys to leave out.

    Raises:
        UserError: rows can't be used as they are: how many, why, and the first three of each kind.
    """
    records, problems, notes = read(file), Problems(file), _Notes()
    rows: list[tuple[Chat, list[Rendering]]] = []
    for record in records:
        with problems.of(record.number):
            chat = schema.chat(record, template, ignore)
            rows.append((chat, render(chat, template)))
    found: list[Conversation] = []
    for start in range(0, len(rows), BATCH_ROWS):
        batch = [(chat, one) for chat, several in rows[start : start + BATCH_ROWS] for one in several]
        found += _tokenize(batch, template, limits, problems, notes)
    problems.raise_any(len(records))
    notes.other_columns = schema.other_columns(records, ("messages",), ignore)
    notes.tell(file, note)
    return found


def _tokenize(
    batch: Sequence[tuple[Chat, Rendering]], template: Template, limits: Limits, problems: Problems, notes: "_Notes"
) -> Iterator[Conversation]:
    if not batch:
        return
    encoded = template.encode([one.text for _, one in batch], return_offsets_mapping=True)
    prompts = iter(_ids([part.prompt for _, one in batch for part in one.parts], template))
    for place, (chat, one) in enumerate(batch):
        ids, offsets = encoded["input_ids"][place], np.array(encoded["offset_mapping"][place])
        own = [next(prompts) for _ in one.parts]
        with problems.of(chat.number):
            limits.check(ids)
            answers = locate(one, ids, offsets, own, template.special_ids)
            marked = template.marked(chat.messages[: one.messages], chat.options) if template.has_marks else None
            has_loss = loss_mask(one, answers, offsets, None if marked is None else np.array(marked, bool))
            trained = tuple(answer for answer in answers if answer.trains)
            notes.apart += one.messages < len(chat.messages)
            notes.without_end += sum(answer.until == answer.end for answer in trained)
            notes.otherwise += sum(answer.first < len(asked) for answer, asked in zip(answers, own, strict=True))
            yield Conversation(chat.file, chat.number, one.messages, np.array(ids, np.int32), has_loss, trained)


def pairs(file: Path, template: Template, limits: Limits, note: Note, ignore: Collection[str] = ()) -> list[TokenPair]:
    """A file's preference pairs in tokens; arguments and errors as for `conversations`."""
    records, problems, notes = read(file), Problems(file), _Notes()
    found: list[TokenPair] = []
    for record in records:
        with problems.of(record.number):
            found.append(_pair(schema.pair(record, template, ignore), template, limits, notes))
    problems.raise_any(len(records))
    notes.other_columns = schema.other_columns(records, schema.PAIR, ignore)
    notes.tell(file, note)
    return found


def _pair(pair: Pair, template: Template, limits: Limits, notes: "_Notes") -> TokenPair:
    """Render and tokenize a pair: the prompt is what both sides share with the prompt alone.

    Raises:
        BadRowError: the prompt is rendered otherwise before a side, beyond its generation prompt, or a limit is met.
    """
    prompt = template.text(pair.prompt, pair.options, add_generation_prompt=True)
    texts = [template.text([*pair.prompt, *side], pair.options) for side in (pair.chosen, pair.rejected)]
    for answer in (pair.chosen, pair.rejected):
        require_written([*pair.prompt, *answer], pair.options, template)
    context = context_of(prompt, pair.prompt, pair.options, template, texts)
    if not all(text.startswith(context) for text in texts):
        raise BadRowError(OTHERWISE)
    asked, chosen, rejected = _ids([prompt, *texts], template)
    length = min(common_length(asked, chosen), common_length(asked, rejected))
    notes.otherwise += length < len(asked)
    for ids in (chosen, rejected):
        limits.check(ids)
        notes.without_end += not template.special_ids.intersection(ids[length:])
    if chosen == rejected:
        raise BadRowError("chosen and rejected are the same tokens: there is nothing to prefer")
    return TokenPair(pair.file, pair.number, chosen[:length], chosen[length:], rejected[length:])


def _ids(texts: Sequence[str], template: Template) -> list[list[int]]:
    return template.encode(texts)["input_ids"] if texts else []


@dataclass
class _Notes:
    """What is not as one might expect in a file, and is no error."""

    apart: int = 0
    otherwise: int = 0
    without_end: int = 0
    other_columns: list[str] = field(default_factory=list)

    def tell(self, file: Path, note: Note) -> None:
        """Say each once, with its count."""
        said = {
            "answers that the chat template renders otherwise once more follows: each has its own sequence": self.apart,
            "prompts that end otherwise alone than before their answer: loss begins where the two part": self.otherwise,
            "answers after which the chat template writes no special token: nothing teaches to stop": self.without_end,
        }
        for what, count in said.items():
            if count:
                note(f"{file.name}: {count} {what}")
        if self.other_columns:
            note(f"{file.name}: columns that are kept out: {', '.join(self.other_columns)}")
