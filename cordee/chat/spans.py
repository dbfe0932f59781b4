"""Where the answers of a chat stand in its rendering, and which tokens carry loss.

Each answer is found by rendering the chat up to it: its first token is the first after the generation prompt, its
last the end-of-turn token. Where the template marks answers with `{% generation %}`, the marks say which tokens carry
loss, and must agree; text behind the end of turn (a newline) may carry loss or not, as the template has it.

An answer that the template renders differently when messages follow (Qwen3 drops earlier reasoning) is not in the
whole chat. It is trained in a sequence of its own, which ends with it: that is how the model will be asked for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cordee.chat.problems import BadRowError
from cordee.chat.schema import Chat
from cordee.chat.source import EarlierAnswers
from cordee.chat.spelling import Message, joined
from cordee.chat.templates import OTHERWISE, Template, common_length
from cordee.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """How much of the prompt the text holds at the least: its generation prompt may begin here."""
    end: int
    """Where the answer's message ends."""
    trains: bool
    is_answered: bool
    """Whether the next message is another one's, so that the token that begins it may end this one (GLM's)."""


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
    begins_differently: bool = False
    """Whether the prompt alone ends in other tokens than before this answer."""


def render(chat: Chat, template: Template, earlier: EarlierAnswers = "own_row") -> list[Rendering]:
    """The chat as one text, and beside it each answer that trains and that the whole text does not hold as asked for.

    Args:
        chat: the messages, and which of them train.
        template: the tokenizer's chat template.
        earlier: what becomes of answers that are rendered differently when messages follow: `own_row`, a text that ends
            with the answer; `skip`, none, but for the chat's last answer.

    Raises:
        BadRowError: the template refuses it, leaves something out, or renders a prompt differently before its answer.
    """
    messages, options = chat.messages, chat.options
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    found = [place for place in answers if chat.trains[place] or template.has_marks]  # marks are checked on all
    whole, *beginnings = template.texts(
        [messages, *(messages[: place + 1] for place in found if place + 1 < len(messages))], options
    )
    template.require_written(messages, options, [place + 1 for place in found if chat.trains[place]])
    asked = iter(template.texts([messages[:place] for place in found if place], options, add_generation_prompt=True))
    parts, apart = [], []
    for place, through in zip(found, [*beginnings, whole], strict=False):
        if place:
            prompt = next(asked)
            context = template.context(prompt, messages[:place], options, [whole])
        else:
            prompt, context = _first_prompt(whole, template)
        end = template.end_in(whole, through)
        is_answered = place + 1 < len(messages) and messages[place + 1]["role"] != "assistant"
        if chat.trains[place]:
            require_thoughts(messages[place], through, f"message {place + 1}")
        if end and whole.startswith(prompt[:context]):
            parts.append(Part(place, prompt, context, end, chat.trains[place], is_answered))
        elif chat.trains[place]:
            if not through.startswith(prompt[:context]):
                raise BadRowError(OTHERWISE, f"message {place + 1}")
            part = Part(place, prompt, context, len(through), trains=True, is_answered=False)
            apart.append(Rendering(place + 1, through, (part,), is_complete=False))
    if any(part.trains for part in parts):
        one = Rendering(len(messages), whole, tuple(parts), is_complete=len(parts) == len(answers))
        return [one, *apart] if earlier == "own_row" else [one]
    return apart if earlier == "own_row" else apart[-1:]


def _first_prompt(whole: str, template: Template) -> tuple[str, int]:
    """The prompt of an answer that begins a chat, and where its generation prompt begins.

    It can't be asked for: transformers renders no chat without a message.

    Raises:
        BadRowError: it can't be told.
    """
    opening = template.generation_prompt
    first = template.special.match(opening)
    if first is None:
        starts = [whole.find(opening)] if opening and opening in whole else []
    else:
        starts = [found.start() for found in template.special.finditer(whole) if found.group() == first.group()]
    if not starts:
        raise BadRowError("it begins with the assistant, and where that answer begins can't be told", "message 1")
    start = max(starts, key=lambda place: common_length(whole[place:], opening))
    return whole[:start] + opening, start


def require_thoughts(message: Message, text: str, where: str) -> None:
    """See that thoughts within an answer are written: DeepSeek R1's template takes out what stands before `</think>`.

    Raises:
        BadRowError: they are left out.
    """
    content = joined(message.get("content") or "")
    thoughts = content.rpartition("</think>")[0].rpartition("<think>")[2].strip()
    if thoughts not in text and "".join(thoughts.split()) not in "".join(text.split()):
        hint = "take it out of the rows, or give the model a chat template that writes it"
        raise BadRowError("the chat template leaves out what an answer says before `</think>`", where, hint)


def locate(rendering: Rendering, ids: Sequence[int], offsets: Offsets, template: Template) -> list[Answer]:
    """The answers of a rendering in its tokens.

    Args:
        rendering: the text.
        ids: `[seq]`, its tokens.
        offsets: `[seq, 2]`, the characters of each token: first, and one past the last.
        template: the chat template.

    Raises:
        BadRowError: nothing of an answer is written.
    """
    special, text, starts = template.special_ids, rendering.text, offsets[:, 0]
    answers = []
    for part in rendering.parts:
        first, begins_differently = _first(part, text, ids, offsets, template)
        bound = int(np.searchsorted(starts, part.end))
        tail = bound  # behind the content: special tokens and blanks
        while tail > first and (ids[tail - 1] in special or not text[slice(*offsets[tail - 1])].strip()):
            tail -= 1
        ends = [place + 1 for place in range(tail, bound) if ids[place] in special]
        if tail <= first and part.trains:
            raise BadRowError("an answer is rendered as nothing", f"message {part.message + 1}")
        end, until = (tail, ends[-1]) if ends else (bound, bound)
        if not ends and part.is_answered and bound < len(ids) and ids[bound] in special:
            until = bound + 1
        answers.append(Answer(part.message, first, end, until, part.trains, begins_differently))
    return answers


def _first(part: Part, text: str, ids: Sequence[int], offsets: Offsets, template: Template) -> tuple[int, bool]:
    """An answer's first token, and whether the prompt alone ends in other tokens.

    The two are compared from the last special token on that both hold, since tokens before it are not changed by what
    follows. Characters would not do: an answer's first token may take in the prompt's last blank.
    """
    shared = common_length(text, part.prompt)
    start = int(np.searchsorted(offsets[:, 0], shared))
    while start and not (ids[start - 1] in template.special_ids and offsets[start - 1, 1] <= shared):
        start -= 1
    start = max(start - 1, 0)
    asked = template.tail(part.prompt[offsets[start, 0] if start else 0 :])
    if start and asked[:1] != [ids[start]]:
        start, asked = 0, template.tail(part.prompt)
    length = common_length(ids[start : start + len(asked)], asked)
    return start + length, length < len(asked)


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


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that training learns to end an answer with; None where the template writes none, or there is none."""
    known = max((token for token in tokenizer.get_vocab() if token.isalnum()), key=len, default="")
    # a vocabulary may have no letters of the first text
    ends = (_end_of(tokenizer, text) for text in ("qzx", known) if text)
    return next((end for end in ends if end is not None), None)


def _end_of(tokenizer: "PreTrainedTokenizerBase", text: str) -> int | None:
    """The token that ends an answer of some text."""
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role in ("user", "assistant", "user")]
    try:
        template = Template(tokenizer)
        chat = Chat(Path(), 1, template.readable(messages, {}), (False, True, False), {})
        for one in render(chat, template):
            encoded = template.encode([one.text], return_offsets_mapping=True)
            (ids,), (offsets,) = encoded["input_ids"], encoded["offset_mapping"]
            for answer in locate(one, ids, np.array(offsets), template):
                if answer.trains and answer.until > answer.end:
                    return int(ids[answer.until - 1])
    except (BadRowError, UserError):  # it takes no such chat, or can't be read
        pass
    return None
