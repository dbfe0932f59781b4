"""What the rows of a file say should carry loss, told from the file itself and not from what was rendered of it.

The rows are read by `raw_files`, rendered and decoded by TRL and transformers alone: no function of `cordee.chat` is
used, so that a fault there is seen here.
"""

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import remove_none_values

from cordee.chat.conversations import Conversation
from cordee.chat.source import Source
from posttrain.training import raw_files

REASONING = ("reasoning_content", "reasoning", "thinking")
Span = tuple[int, int]
UNREAD = "cordee-unread"
"""A key that no template reads: where it is written, a list was written as Python or JSON writes one."""


def _joined(parts: list[dict[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)


FORMS: tuple[Callable[[list[dict[str, Any]]], Any], ...] = (
    list,
    _joined,
    lambda parts: [{**parts[0], "text": _joined(parts)}],
)
"""How a template may take a list of text parts: as it is, as one text, or as one part."""


@dataclass
class Found:
    """What was found when a chat of a batch was compared with its row."""

    faults: Counter[str] = field(
        default_factory=lambda: Counter(
            # other tokens than transformers renders from the row's messages, tools and `chat_template_kwargs`
            chats_unlike_their_row=0,
            # an answer, or its reasoning, tool calls or end of turn, of which a part carries loss and a part none
            answers_partly_without_loss=0,
            # what users, tools and the system say, and answers marked `train: false` or `weight: 0`
            other_texts_with_loss=0,
            tools_not_in_the_prompt=0,
        )
    )
    """Each must be 0."""
    carried: list[int] = field(default_factory=list)
    """The messages, from 0, that carry loss."""


class Rows:
    """The rows of a file of chats, as they stand there."""

    def __init__(self, file: Path, tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
        """Read the file; the source says which columns and keys are renamed or left out, and what is a text."""
        self.rows: dict[int, dict[str, Any]] = {at: remove_none_values(row) for at, row in raw_files.read(file).items()}
        self.tokenizer, self.source = tokenizer, source
        self.ignore = {*source.ignore, "train", "weight"}
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = re.compile(rf"\s*({'|'.join(map(re.escape, special)) or '(?!)'})")

    def row(self, number: int) -> dict[str, Any]:
        """A row (from 1) with its `messages`, or with `text` and the `prompt` before it."""
        names, left_out = self.source.columns, self.source.ignore
        given = {names.get(key, key): value for key, value in self.rows[number].items() if key not in left_out}
        return raw_files.shaped(given, as_text=self.source.as_text or not self.tokenizer.chat_template)

    def trains(self, number: int) -> list[int]:
        """The messages (from 0) of a row (from 1) that must carry loss; of a text, 0."""
        row = self.row(number)
        if "messages" not in row:
            return [0]
        return [
            place
            for place, message in enumerate(row["messages"])
            if message["role"] == "assistant" and message.get("train", True) and message.get("weight", 1)
        ]

    def promised(self, chat: Conversation) -> set[tuple[int, int]]:
        """The answers of a chat's row, by row and message, that must carry loss; of one that is cut, those it has."""
        places = [answer.message for answer in chat.answers] if chat.is_cut else self.trains(chat.number)
        return {(chat.number, place) for place in places}

    def compare(self, chat: Conversation, ids: np.ndarray, has_loss: np.ndarray) -> Found:
        """Compare a chat of a batch, `ids` and `has_loss` `[seq]`, with what its row says up to its last message."""
        row = self.row(chat.number)
        if "messages" not in row:
            return self._compare_text(row, ids, has_loss, is_cut=chat.is_cut)
        found, trains, count = Found(), self.trains(chat.number), chat.messages
        runs = list(self._runs(ids, has_loss))
        text = "".join(part for part, _ in runs)
        loss = np.concatenate([np.full(len(part), with_loss) for part, with_loss in runs])
        allowed = np.zeros(len(text), dtype=bool)
        before = at = 0
        for place, message in enumerate(row["messages"][:count]):
            span = self._find(message, text, loss, at, in_loss=place in trains)
            if span is None:
                if chat.is_cut and place in trains and loss[at:].any():  # the beginning of an answer
                    allowed[at:] = True
                    found.carried.append(place)
                    break
                continue
            before, at = at, span[1]
            if place in trains and loss[slice(*span)].any():
                after = self._next(row["messages"][place + 1 : count], text, loss, at)
                found.carried.append(place)
                allowed[before:after] = True
                whole = self._is_whole(message, span, text, loss, (before, after))
                found.faults["answers_partly_without_loss"] += not whole
        found.faults["other_texts_with_loss"] += bool((loss & ~allowed).any())
        expected = self._ids(row, len(row["messages"]) if chat.is_cut else count)
        found.faults["chats_unlike_their_row"] += not _is_beginning(ids, expected, is_cut=chat.is_cut)
        for tool in self._json(row.get("tools")) or []:
            name = tool.get("function", tool).get("name", "")
            stands = any(name in part for part, with_loss in runs if not with_loss)
            found.faults["tools_not_in_the_prompt"] += not stands
        return found

    def _compare_text(self, row: Mapping[str, Any], ids: np.ndarray, has_loss: np.ndarray, *, is_cut: bool) -> Found:
        """Compare a text of a batch with its row: its tokens and its eos, and loss from where its prompt ends."""
        found, eos = Found(carried=[0]), self.tokenizer.eos_token_id
        whole, said = row.get("prompt", "") + row["text"], row["text"]
        begins = bool(self.tokenizer.bos_token) and whole.startswith(self.tokenizer.bos_token)
        expected = list(self.tokenizer(whole, add_special_tokens=not begins)["input_ids"])
        is_ended = eos is None or expected[-1] == eos or whole.rstrip().endswith(self.tokenizer.eos_token)
        expected += [] if is_ended else [eos]
        first = int(np.argmax(has_loss))
        with_loss = self._decoded(ids[first:])
        found.faults["chats_unlike_their_row"] += not _is_beginning(ids, expected, is_cut=is_cut)
        found.faults["answers_partly_without_loss"] += not has_loss[first:].all()
        begins_rightly = not row.get("prompt") or said.lstrip()[:4] in with_loss[: len(said[:4]) + 8]
        found.faults["other_texts_with_loss"] += not begins_rightly
        return found

    def _ids(self, row: Mapping[str, Any], count: int) -> list[int]:
        """The tokens of the row's first `count` messages as transformers renders it; none where the template can't."""
        given = [
            {key: value for key, value in message.items() if key not in self.ignore and (value or key != "tool_calls")}
            for message in row["messages"]
        ]
        options = {name: self._json(row.get(name)) or None for name in ("tools", "documents")}
        options |= self._json(row.get("chat_template_kwargs")) or {}
        names = {name for message in given for name in _names(message)}
        for form in (self._with_mappings, self._with_texts):
            messages = self._as_read([form(message) for message in given], options)
            with contextlib.suppress(Exception):  # a template raises jinja2's errors, and whatever its filters raise
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
                if all(name in text for name in names):
                    how = {"tokenize": True, "return_dict": True}
                    return list(self.tokenizer.apply_chat_template(messages[:count], **how, **options)["input_ids"])
        return []

    def _as_read(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages with lists of text parts in the first form that the template writes whole, tried with marks."""
        part = {"type": "text", UNREAD: ""}
        marked = [
            message | {"content": [part | {"text": f"<{at}-{n}>"} for n, _ in enumerate(message["content"])]}
            if _is_list(message)
            else message
            for at, message in enumerate(messages)
        ]
        marks = [part["text"] for message in marked if _is_list(message) for part in message["content"]]
        for form in FORMS if marks else ():
            found, tried = (
                [message | {"content": form(message["content"])} if _is_list(message) else message for message in chat]
                for chat in (messages, marked)
            )
            with contextlib.suppress(Exception):  # a template raises jinja2's errors, and whatever its filters raise
                text = self.tokenizer.apply_chat_template(tried, tokenize=False, **options)
                if UNREAD not in text and all(mark in text for mark in marks):
                    return found
        return messages

    @staticmethod
    def _with_mappings(message: dict[str, Any]) -> dict[str, Any]:
        """A message whose tool calls have a mapping for arguments."""
        return _called(message, lambda value: json.loads(value.strip() or "{}") if isinstance(value, str) else value)

    @staticmethod
    def _with_texts(message: dict[str, Any]) -> dict[str, Any]:
        """A message whose tool calls have a text for arguments, beside a content of null, as DeepSeek's template."""

        def text(value: Any) -> str:
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

        silent = {"content": None} if "tool_calls" in message and not message.get("content") else {}
        return _called(message | silent, text) if silent else message

    @staticmethod
    def _json(value: Any) -> Any:
        """What may stand in a row as JSON text, as a whole or item by item."""
        if isinstance(value, list):
            return [json.loads(item) if isinstance(item, str) else item for item in value]
        return (json.loads(value) if value.strip() else None) if isinstance(value, str) else value

    def _runs(self, ids: np.ndarray, has_loss: np.ndarray) -> Iterator[tuple[str, bool]]:
        """The text of the tokens, in runs that carry loss or carry none."""
        edges = [0, *(np.flatnonzero(np.diff(has_loss)) + 1), len(ids)]
        for first, until in itertools.pairwise(edges):
            yield self._decoded(ids[first:until]), bool(has_loss[first])

    def _decoded(self, ids: Any) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _said(self, text: str) -> str:
        """A text as it comes back from its tokens, which a normalizer may have changed."""
        return self._decoded(self.tokenizer(text, add_special_tokens=False)["input_ids"]).strip()

    def _find(self, message: Mapping[str, Any], text: str, loss: np.ndarray, at: int, *, in_loss: bool) -> Span | None:
        """Where a message's content stands, or else its first tool call: among texts with loss first, or without."""
        parts = [part["text"] for part in message["content"]] if _is_list(message) else [message.get("content") or ""]
        said = [own for part in parts if (own := self._said(part))] or _names(message)[:1]
        if not any(said):
            return None
        pattern = re.compile(r"\s*".join(map(re.escape, said)))  # of parts, a template may part or trim each
        spans = [found.span() for found in pattern.finditer(text, at)]
        fits = (span for span in spans if bool(loss[slice(*span)].all()) == in_loss)
        return next(fits, None) or next(iter(spans), None)

    def _next(self, messages: list[Mapping[str, Any]], text: str, loss: np.ndarray, at: int) -> int:
        """Where the next message's content begins, which an answer and its end of turn can't reach."""
        for message in messages:
            if span := self._find(message, text, loss, at, in_loss=message["role"] == "assistant"):
                return span[0]
        return len(text)

    def _is_whole(self, message: Mapping[str, Any], span: Span, text: str, loss: np.ndarray, zone: Span) -> bool:
        """Whether an answer carries loss with all that it has: reasoning, tool calls, end of turn."""
        parts = [self._said(message[key]) for key in REASONING if isinstance(message.get(key), str)]
        places = [(text.find(part, *zone), len(part)) for part in (*parts, *_names(message))]
        spans = [(place, place + length) for place, length in places]
        end = self.special.match(text, span[1])
        spans += [end.span(1)] if end else []
        return all(place >= 0 and loss[place:until].all() for place, until in [span, *spans])


def _is_beginning(ids: np.ndarray, expected: list[int], *, is_cut: bool) -> bool:
    """Whether ids are those expected; of a chat that was cut, the first of them."""
    return bool(ids.tolist() == (expected[: len(ids)] if is_cut else expected))


def _called(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A message with other arguments of its tool calls."""
    calls = []
    for call in message.get("tool_calls", ()):
        function = dict(call.get("function", call))
        if "arguments" in function:
            function["arguments"] = change(function["arguments"])
        calls.append({**call, "function": function} if "function" in call else function)
    return message | ({"tool_calls": calls} if calls else {})


def _is_list(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("content"), list)


def _names(message: Mapping[str, Any]) -> list[str]:
    """The names of the tools that a message calls."""
    return [call.get("function", call).get("name", "") for call in message.get("tool_calls") or []]
