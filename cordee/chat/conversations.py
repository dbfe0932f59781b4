"""Chats in tokens, and which tokens carry loss.

Each answer is found by rendering the chat up to it: its first token is the first after the generation prompt, its
last the end-of-turn token. Where the template marks answers with `{% generation %}`, the marks say which tokens carry
loss, and must agree; text behind the end of turn (a newline) may carry loss or not, as the template has it.

An answer that the template renders otherwise once more follows (Qwen3 drops earlier reasoning) is not found in the
whole chat. It is trained in a sequence of its own, which ends with it: that is how the model will be asked for it.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cordee.chat import schema
from cordee.chat.formats import BadRowError, Limits, Note, Notes, Problems, read
from cordee.chat.schema import Chat
from cordee.chat.templates import OTHERWISE, Template, common_length

BATCH_ROWS = 1000
Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """An answer in a rendered text, in characters."""

    message: int
    """Its place among the chat's messages, from 0."""
    prompt: str
    """What the template writes when it asks for this answer."""
    context: int
    """Where its generation prompt begins."""
    end: int
    """Where the answer's message ends."""
    trains: bool


@dataclass(frozen=True)
class Rendering:
    """A chat, or its beginning, as the template writes it."""

    messages: int
    """How many of the chat's messages it holds."""
    text: str
    parts: tuple[Part, ...]
    """The answers that stand here as they will be asked for."""
    is_complete: bool
    """Whether every answer is among `parts`."""


@dataclass(frozen=True)
class Answer:
    """An answer in a tokenized chat: places of tokens."""

    message: int
    first: int
    """Its first token."""
    end: int
    """One past its last token of content."""
    until: int
    """One past its end-of-turn token; equal to `end` where the template writes none."""
    trains: bool


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


def tokenize(
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
    records, problems, notes = read(file), Problems(file), Notes()
    found: list[Conversation] = []
    for start in range(0, len(records), BATCH_ROWS):
        batch: list[tuple[Chat, Rendering]] = []
        for record in records[start : start + BATCH_ROWS]:
            with problems.of(record.number):
                chat = schema.chat(record, template, ignore)
                batch += [(chat, rendering) for rendering in render(chat, template)]
        if batch:
            found += _tokenize(batch, template, limits, problems, notes)
    problems.raise_any(len(records))
    notes.other_columns = schema.other_columns(records, ("messages",), ignore)
    notes.tell(file, note)
    return found


def first(file: Path, count: int, template: Template, limits: Limits) -> list[tuple[Chat, list[int]]]:
    """The first chats of a file, or of its pairs the prompt with the chosen answer, each with its token ids `[seq]`.

    Nothing is trained on them: what the template does not read is left out.

    Raises:
        UserError: rows that are neither, or that are too long.
    """
    records, problems = read(file)[:count], Problems(file)
    found = []
    for record in records:
        with problems.of(record.number):
            chat = schema.chosen(record, template)
            (ids,) = template.encode([template.text(chat.messages, chat.options)])["input_ids"]
            limits.check(ids)
            found.append((chat, ids))
    problems.raise_any(len(records))
    return found


def _tokenize(
    batch: Sequence[tuple[Chat, Rendering]], template: Template, limits: Limits, problems: Problems, notes: Notes
) -> list[Conversation]:
    prompts = iter(template.encode([part.prompt for _, one in batch for part in one.parts])["input_ids"])
    found = []
    for (chat, one), (ids, offsets, marked) in zip(batch, _encoded(batch, template), strict=True):
        own = [next(prompts) for _ in one.parts]
        with problems.of(chat.number):
            limits.check(ids)
            answers = locate(one, ids, offsets, own, template.special_ids)
            has_loss = loss_mask(one, answers, offsets, marked)
            trained = tuple(answer for answer in answers if answer.trains)
            notes.apart += one.messages < len(chat.messages)
            notes.without_end += sum(answer.until == answer.end for answer in trained)
            notes.otherwise += sum(answer.first < len(asked) for answer, asked in zip(answers, own, strict=True))
            found.append(Conversation(chat.file, chat.number, one.messages, np.array(ids, np.int32), has_loss, trained))
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


def render(chat: Chat, template: Template) -> list[Rendering]:
    """The chat as one text, and beside it each answer that trains and that the whole text does not hold as asked for.

    Raises:
        BadRowError: the template refuses it, leaves a message out, or renders a prompt otherwise before its answer.
    """
    messages, options = chat.messages, chat.options
    whole = template.text(messages, options)
    template.require_written(messages, options)
    parts, apart, is_complete = [], [], True
    for place in [place for place, message in enumerate(messages) if message["role"] == "assistant"]:
        through = whole if place == len(messages) - 1 else template.text(messages[: place + 1], options)
        prompt, context = _prompt(chat, place, template, whole)
        end = template.end_in(whole, through)
        if chat.trains[place]:
            template.require_written(messages[: place + 1], options)
        if end and whole.startswith(prompt[:context]):
            parts.append(Part(place, prompt, context, end, chat.trains[place]))
            continue
        is_complete = False
        if not chat.trains[place]:
            continue
        if not through.startswith(prompt[:context]):
            raise BadRowError(OTHERWISE, f"message {place + 1}")
        part = Part(place, prompt, context, len(through), trains=True)
        apart.append(Rendering(place + 1, through, (part,), is_complete=False))
    if any(part.trains for part in parts):
        return [Rendering(len(messages), whole, tuple(parts), is_complete), *apart]
    return apart


def _prompt(chat: Chat, place: int, template: Template, whole: str) -> tuple[str, int]:
    """The generation prompt, and how much of it the whole text has to contain."""
    if place:
        return template.prompt(chat.messages[:place], chat.options, [whole])
    start = whole.find(template.generation_prompt)  # transformers renders no chat without a message
    if start < 0 or not template.generation_prompt:
        raise BadRowError("it begins with the assistant, and where that answer begins can't be told", "message 1")
    return whole[: start + len(template.generation_prompt)], start


def locate(
    rendering: Rendering,
    ids: Sequence[int],
    offsets: Offsets,
    prompts: Sequence[Sequence[int]],
    special: frozenset[int],
) -> list[Answer]:
    """The answers of a rendering in its tokens.

    Args:
        rendering: the text.
        ids: `[seq]`, its tokens.
        offsets: `[seq, 2]`, the characters of each token: first, and one past the last.
        prompts: the token ids of each part's prompt.
        special: the ids of special tokens, one of which ends a turn.
    """
    answers = []
    for part, prompt in zip(rendering.parts, prompts, strict=True):
        first = common_length(ids, prompt)
        bound = int(np.searchsorted(offsets[:, 0], part.end))
        tail = bound  # behind the content: special tokens and blanks
        while tail > first and (ids[tail - 1] in special or not _piece(rendering.text, offsets[tail - 1]).strip()):
            tail -= 1
        ends = [place + 1 for place in range(tail, bound) if ids[place] in special]
        if bound <= first or (tail == first and not ends):
            raise BadRowError("an answer is rendered as nothing", f"message {part.message + 1}")
        end, until = (tail, ends[-1]) if ends else (bound, bound)
        if not ends and bound < len(ids) and ids[bound] in special:  # GLM stops at what begins the next turn
            until = bound + 1
        answers.append(Answer(part.message, first, end, until, part.trains))
    return answers


def loss_mask(rendering: Rendering, answers: Sequence[Answer], offsets: Offsets, marked: Mask | None) -> Mask:
    """`[seq]`: the tokens that carry loss: answers that train, with their end of turn.

    Raises:
        BadRowError: the marks (`marked`, `[seq]`) leave out a token of an answer, or take in one of a prompt.
    """
    has_loss = np.zeros(len(offsets), dtype=bool)
    if marked is None:
        for answer in answers:
            has_loss[answer.first : answer.until] = answer.trains
        return has_loss
    for place in np.flatnonzero(offsets[1:, 0] < offsets[:-1, 1]):  # transformers marks the first token of a character
        marked[place + 1] |= marked[place]
    zones = np.zeros(len(offsets), dtype=bool)
    for part, answer in zip(rendering.parts, answers, strict=True):
        zone = slice(
            np.searchsorted(offsets[:, 0], part.context), max(answer.until, np.searchsorted(offsets[:, 0], part.end))
        )
        zones[zone] = True
        has_loss[zone] = marked[zone] & part.trains
        where = f"message {part.message + 1}"
        if part.trains and not marked[answer.first : answer.end].all():
            raise BadRowError("the template's generation marks leave out a token of an answer", where)
        if part.trains and answer.until > answer.end and not marked[answer.end : answer.until].any():
            raise BadRowError(
                "the template's generation marks leave out the end of turn: the model would never stop", where
            )
    if rendering.is_complete and (wrong := marked & ~zones).any():
        raise BadRowError(
            "the template's generation marks take in a token of a prompt", f"token {int(np.argmax(wrong))}"
        )
    return has_loss


def _piece(text: str, span: npt.NDArray[np.int64]) -> str:
    return text[int(span[0]) : int(span[1])]
