"""Loss spans: where the assistant's answers stand in a rendered chat.

Each answer is found by rendering the chat up to it: its first token is the first after the generation prompt, its
last the end-of-turn token. Where the template marks answers with `{% generation %}`, the marks say which tokens carry
loss, and must agree; text behind the end of turn (a newline) may carry loss or not, as the template has it.

An answer that the template renders otherwise once more follows (Qwen3 drops earlier reasoning) is not found in the
whole chat. It is trained in a sequence of its own, which ends with it: that is how the model will be asked for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cordee.chat.formats import BadRowError
from cordee.chat.schema import Chat
from cordee.chat.templates import Message, Template

OTHERWISE = "the chat template renders a prompt otherwise alone than before its answer"
Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """An answer in a rendered text, in characters."""

    message: int
    """Its place among the chat's messages, from 0."""
    prompt: str
    """What the template writes when it asks for this answer."""
    context: int
    """Where the generation prompt begins."""
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


def render(chat: Chat, template: Template) -> list[Rendering]:
    """The chat as one text, and beside it each answer that trains and that the whole text does not hold as asked for.

    Raises:
        BadRowError: the template refuses it, leaves a message out, or renders a prompt otherwise before its answer.
    """
    messages, options = chat.messages, chat.options
    whole = template.text(messages, options)
    require_written(messages, options, template)
    parts, apart, is_complete = [], [], True
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, context = _prompt(messages[:place], options, template, whole)
        through = whole if place == len(messages) - 1 else template.text(messages[: place + 1], options)
        end = _end_in(whole, through, template)
        if chat.trains[place]:
            require_written(messages[: place + 1], options, template)
        if end and whole.startswith(context):
            parts.append(Part(place, prompt, len(context), end, chat.trains[place]))
            continue
        is_complete = False
        if chat.trains[place]:
            if not through.startswith(context):
                raise BadRowError(OTHERWISE, f"message {place + 1}")
            part = Part(place, prompt, len(context), len(through), trains=True)
            apart.append(Rendering(place + 1, through, (part,), is_complete=False))
    in_whole = (
        [Rendering(len(messages), whole, tuple(parts), is_complete)] if any(part.trains for part in parts) else []
    )
    return [*in_whole, *apart]


def _end_in(whole: str, through: str, template: Template) -> int:
    """Where the beginning of a chat ends in the whole text; 0 if it is not there as it is when nothing follows.

    Only special tokens behind its end of turn may differ (Phi-3 ends a chat, but no turn within it, with one more).
    """
    end = common_length(whole, through)
    if end == len(through):
        return end
    for found in template.special.finditer(through):
        if found.start() < end < found.end():
            end = found.start()
    beginning = through[:end].rstrip()
    is_closed = any(found.end() == len(beginning) for found in template.special.finditer(beginning))
    return end if is_closed and not template.special.sub("", through[end:]).strip() else 0


def require_written(messages: list[Message], options: dict[str, Any], template: Template) -> None:
    """See that the template writes what each message says: some leave out roles that they don't know.

    Raises:
        BadRowError: it leaves something out.
    """
    for place, key in template.left_out(messages, options):
        problem = f"the chat template leaves out the {key!r} of a message of the {messages[place]['role']!r}"
        hint = "" if key == "content" else f"`ignore: [{key}]` beside the file's path leaves it out"
        raise BadRowError(problem, f"message {place + 1}", hint)


def _prompt(before: list[Message], options: dict[str, Any], template: Template, whole: str) -> tuple[str, str]:
    """What asks for an answer after these messages, and its beginning without the generation prompt."""
    if not before:  # transformers renders no chat without a message
        start = whole.find(template.generation_prompt)
        if start < 0 or not template.generation_prompt:
            raise BadRowError("it begins with the assistant, and where that answer begins can't be told", "message 1")
        return whole[: start + len(template.generation_prompt)], whole[:start]
    prompt = template.text(before, options, add_generation_prompt=True)
    return prompt, context_of(prompt, before, options, template, [whole])


def context_of(
    prompt: str, before: list[Message], options: dict[str, Any], template: Template, texts: Sequence[str]
) -> str:
    """The beginning of a prompt that has to stand in the texts: all of it, or all but its generation prompt.

    Templates may end a prompt in another way than an answer begins (DeepSeek's with `<think>`).
    """
    stands = all(text.startswith(prompt) for text in texts)
    if stands and not template.has_marks:
        return prompt
    end = _end_in(prompt, template.text(before, options), template)
    return prompt[:end] if end else prompt


def locate(
    rendering: Rendering,
    ids: Sequence[int],
    offsets: npt.NDArray[np.int64],
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
        if tail == first and not ends:
            raise BadRowError("an answer is rendered as nothing", f"message {part.message + 1}")
        answers.append(Answer(part.message, first, tail if ends else bound, ends[-1] if ends else bound, part.trains))
    return answers


def loss_mask(
    rendering: Rendering, answers: Sequence[Answer], offsets: npt.NDArray[np.int64], marked: Mask | None
) -> Mask:
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
        zone = slice(*np.searchsorted(offsets[:, 0], [part.context, part.end]))
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


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters or tokens two sequences share at their beginning."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place in range(shorter) if one[place] != other[place])


def _piece(text: str, span: npt.NDArray[np.int64]) -> str:
    return text[int(span[0]) : int(span[1])]
