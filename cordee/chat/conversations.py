"""Rows of chats and of texts in tokens, with the tokens that carry loss."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cordee.chat import formats, schema, texts
from cordee.chat.problems import BadRowError, Notes, Problems
from cordee.chat.schema import Chat, Record
from cordee.chat.selection import files_of
from cordee.chat.source import Limits, Rules, Source
from cordee.chat.spans import Answer, Mask, Offsets, Rendering, locate, loss_mask, render
from cordee.chat.templates import Template
from cordee.config import Input
from cordee.data.row import Row
from cordee.data.rows import batches
from cordee.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Conversation:
    """A chat in tokens, or its beginning; or a text."""

    file: Path
    number: int
    """Its row in the file, from 1."""
    messages: int
    """How many of the row's messages it holds; 0 of a text."""
    ids: Ids
    """`[seq]`, int32."""
    has_loss: Mask
    """`[seq]`, bool."""
    answers: tuple[Answer, ...]
    """The answers that carry loss here; of a text, what carries loss."""
    is_cut: bool = False
    """Whether tokens that follow were left out, since there were too many."""


@dataclass(frozen=True)
class Encoder:
    """How the rows of one source become token ids."""

    tokenizer: "PreTrainedTokenizerBase"
    template: Template | None
    """None where the tokenizer has no chat template: texts alone can be read then."""
    source: Source
    rules: Rules

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", source: Source, rules: Rules) -> "Encoder":
        """An encoder; reads the tokenizer's chat template."""
        return cls(tokenizer, Template(tokenizer) if tokenizer.chat_template else None, source, rules)

    @property
    def as_text(self) -> bool:
        """Whether strings are joined as they stand."""
        return self.source.as_text or self.template is None

    def conversations(self, rows: Sequence[Row], problems: Problems, notes: Notes) -> list[Conversation]:
        """Chats and texts in tokens; of a row with a problem, none."""
        batch: list[tuple[Chat, Rendering]] = []
        chats: list[Chat] = []
        found: list[Conversation] = []
        for row in rows:
            with problems.of(row.file, row.number, row.values):
                values = formats.columns_of(row, self.source)
                shaped = formats.chat(values, as_text=self.as_text)
                if isinstance(shaped, formats.Text):
                    notes.other_columns.update(values.keys() - {*formats.CHATS[formats.shape(values)], "label"})
                    ids, answer = texts.tokenize(shaped, self.tokenizer)
                    mask = texts.has_loss(ids, answer)
                    whole = Conversation(row.file, row.number, 0, np.array(ids, np.int32), mask, (answer,))
                    found.append(fitted(whole, self.rules, notes))
                    notes.texts += 1
                    notes.look_at(shaped.completion)
                    continue
                template = self.required_template()
                chat = schema.chat(Record(row.file, row.number, shaped), template, self.source.ignore)
                notes.other_columns.update(schema.other_columns(shaped, ("messages",), self.source.ignore))
                renderings = render(chat, template, self.rules.earlier_answers)
                notes.skipped += sum(chat.trains) - sum(part.trains for one in renderings for part in one.parts)
                batch += [(chat, one) for one in renderings]
                chats.append(chat)
        if batch:
            found += self._tokenized(batch, problems, notes)
        for chat in chats:
            if not problems.has(chat.file, chat.number):
                _note(chat, notes)
        return [one for one in found if not problems.has(one.file, one.number)]

    def required_template(self) -> Template:
        """The chat template.

        Raises:
            BadRowError: there is none.
        """
        if self.template is None:
            hint = "name one by the stage's `chat_template`, such as chatml"
            raise BadRowError("is a chat, and the tokenizer has no chat template", hint=hint)
        return self.template

    def _tokenized(
        self, batch: Sequence[tuple[Chat, Rendering]], problems: Problems, notes: Notes
    ) -> Iterator[Conversation]:
        template = self.required_template()
        for (chat, one), (ids, offsets, marked) in zip(batch, _encoded(batch, template), strict=True):
            with problems.of(chat.file, chat.number, chat.messages):
                answers = locate(one, ids, offsets, template)
                has_loss = loss_mask(one, answers, offsets, marked)
                trained = tuple(answer for answer in answers if answer.trains)
                notes.apart += one.messages < len(chat.messages)
                notes.without_end += sum(answer.until == answer.end for answer in trained)
                notes.begins_differently += sum(answer.begins_differently for answer in answers)
                whole = Conversation(chat.file, chat.number, one.messages, np.array(ids, np.int32), has_loss, trained)
                yield fitted(whole, self.rules, notes)


def _note(chat: Chat, notes: Notes) -> None:
    """Note what is odd in what a chat trains and in how it ends."""
    notes.chats += 1
    notes.asking += chat.messages[-1]["role"] == "user"
    for message, trains in zip(chat.messages, chat.trains, strict=True):
        if trains and message.keys() <= {"role", "content"}:
            notes.look_at(message.get("content"))


def fitted(one: Conversation, rules: Rules, notes: Notes) -> Conversation:
    """A sequence within the limits, shortened where the rules say so.

    Raises:
        OverlongRowError: it is too long, or nothing that carries loss is left of it.
        BadRowError: it holds an id beyond the model's embedding.
    """
    rules.limits.check_ids(one.ids)
    longest = rules.limits.longest
    if longest is None or len(one.ids) <= longest:
        return one
    if rules.overlong not in ("truncate", "cut"):
        raise rules.limits.overlong(len(one.ids))
    is_text = not one.messages
    ends = (answer.until for answer in one.answers if answer.until <= longest)
    until = longest if is_text or rules.overlong == "cut" else max(ends, default=0)
    if not one.has_loss[:until].any():
        raise rules.limits.overlong(len(one.ids), "no answer is left of it")
    notes.cut += 1
    kept = tuple(
        replace(answer, end=min(answer.end, until), until=min(answer.until, until))
        for answer in one.answers
        if answer.first < until
    )
    messages = one.messages if rules.overlong == "cut" or is_text else kept[-1].message + 1
    return replace(
        one, messages=messages, ids=one.ids[:until], has_loss=one.has_loss[:until], answers=kept, is_cut=True
    )


def first(path: Path, count: int, template: Template, limits: Limits) -> list[tuple[Chat, list[int]]]:
    """The first chats of a file, or of its pairs the prompt with the chosen answer, each with its token ids `[seq]`.

    Nothing is trained on them: what the template does not read is left out.

    Raises:
        UserError: rows that are neither, or that are too long.
    """
    source, problems = Source(path=Input(path)), Problems()
    rows = list(itertools.islice(itertools.chain.from_iterable(batches(files_of(source).documents)), count))
    found = []
    for row in rows:
        with problems.of(row.file, row.number, row.values):
            chat = schema.chosen(Record(row.file, row.number, formats.columns_of(row, source)), template)
            (ids,) = template.encode([template.text(chat.messages, chat.options)])["input_ids"]
            limits.check(ids)
            found.append((chat, ids))
    problems.raise_any(path, len(rows))
    if not found:
        raise UserError("holds no rows", file=path)
    return found


def _encoded(
    batch: Sequence[tuple[Chat, Rendering]], template: Template
) -> Iterator[tuple[list[int], Offsets, Mask | None]]:
    """Of each rendering its token ids `[seq]`, their characters `[seq, 2]`, and what the template marks `[seq]`."""
    if not template.has_marks:
        whole = template.encode([one.text for _, one in batch], return_offsets_mapping=True)
        for ids, offsets in zip(whole["input_ids"], whole["offset_mapping"], strict=True):
            yield ids, np.array(offsets), None
        return
    for options, group in itertools.groupby(batch, key=lambda item: item[0].options):
        part = template.encode_chats([chat.messages[: one.messages] for chat, one in group], options)
        columns = (part[name] for name in ("input_ids", "offset_mapping", "assistant_masks"))
        for ids, offsets, marked in zip(*columns, strict=True):
            yield ids, np.array(offsets), np.array(marked, bool)
