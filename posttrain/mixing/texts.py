"""What a row says, whatever its shape, and the form in which two texts count as the same."""

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cordee.chat import formats
from cordee.chat.problems import BadRowError
from cordee.chat.schema import OPTIONS
from cordee.chat.spelling import joined
from cordee.chat.values import texts_in, without_nulls

BESIDE = ("label", "answer", "tests", *OPTIONS)
"""Columns that make other rows of the same texts."""


@dataclass(frozen=True)
class RowText:
    """The texts of a row."""

    prompt: str
    """What is asked: all turns before the last answer; empty for a plain text."""
    answers: tuple[str, ...]
    """The answer, or both of a pair; of a plain text, the text; none where a prompt stands alone."""
    beside: str = ""
    """The row's other columns that tell it apart, as JSON."""

    @property
    def whole(self) -> str:
        """All that the row says."""
        return "\n".join(filter(None, (self.prompt, *self.answers)))

    @property
    def asked(self) -> str:
        """The prompt, or of a plain text the whole."""
        return self.prompt or self.whole


def read(values: Mapping[str, Any]) -> RowText:
    """The texts of a chat, a pair, a text, a prompt, or a prompt with its answer.

    Raises:
        BadRowError: the row is none of these.
    """
    found = without_nulls(values)
    beside = {name: found[name] for name in BESIDE if name in found}
    told = json.dumps(beside, sort_keys=True, ensure_ascii=False, default=str) if beside else ""
    return replace(_read({name: value for name, value in found.items() if name != "label"}), beside=told)


def _read(row: dict[str, Any]) -> RowText:
    """The texts of a row without a label: a bad answer is one too."""
    if all(column in row for column in formats.PAIRS):
        pair = formats.pair(row, as_text=False)
        if isinstance(pair, formats.TextPair):
            return _said(pair.prompt, pair.chosen, pair.rejected)
        return _said(*(_of_messages(pair[side]) for side in ("prompt", *formats.PAIRS)))
    if formats.shape(row) == "prompt":
        asked, answer = formats.question(row)
        return _said(_of_messages(asked["messages"]), *([] if answer is None else [" ".join(texts_in(answer))]))
    chat = formats.chat(row, as_text=False)
    if isinstance(chat, formats.Text):
        return _said(chat.prompt, chat.completion)
    messages = chat["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadRowError("messages is no list of messages")
    is_answered = isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant"
    before, last = (messages[:-1], messages[-1:]) if is_answered else (messages, [])
    return _said(_of_messages(before), *map(_of_message, last))


def _said(prompt: str, *answers: str) -> RowText:
    found = RowText(prompt, tuple(filter(None, answers)))
    if not found.whole.strip():
        raise BadRowError("says nothing")
    return found


def _of_messages(messages: Any) -> str:
    return "\n".join(filter(None, map(_of_message, messages)))


def _of_message(message: Any) -> str:
    """All texts in a message: its content, its reasoning, its calls of tools."""
    if not isinstance(message, Mapping):
        raise BadRowError("a message is no mapping")
    return "\n".join(_texts(message))


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        yield joined(content)
    elif isinstance(content, str):
        yield content
    yield from (text for key, value in message.items() if key not in ("role", "content") for text in texts_in(value))


def normalised(text: str) -> str:
    """A text without what does not tell two apart: composed (NFC), case folded, each run of blanks one blank."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def digest(parts: Sequence[str]) -> int:
    """64 bits of a row's parts: of a hundred million rows, two others share theirs once in four thousand times."""
    told = json.dumps(parts).encode()  # which says where a part ends
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")
