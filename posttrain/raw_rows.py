"""What the rows of a file say should carry loss, told from the file itself and not from what was rendered of it.

The rows are read, rendered and decoded by pyarrow, json, TRL and transformers alone: nothing of `cordee.chat` is used,
so that a fault there is seen here.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import remove_none_values

REASONING = ("reasoning_content", "reasoning", "thinking")
Span = tuple[int, int]


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

    def __init__(self, file: Path, tokenizer: PreTrainedTokenizerBase, ignore: Collection[str]) -> None:
        """Read the file; `ignore` are the columns and keys of messages that the recipe leaves out."""
        if file.suffix == ".parquet":
            rows = pq.read_table(file).to_pylist()
        else:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        self.rows: list[dict[str, Any]] = [remove_none_values(row) for row in rows]
        self.tokenizer, self.ignore = tokenizer, {*ignore, "train", "weight"}
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = re.compile(rf"\s*({'|'.join(map(re.escape, special)) or '(?!)'})")

    def trains(self, number: int) -> list[int]:
        """The messages of a row (both from 0) that must carry loss."""
        messages = enumerate(self.rows[number]["messages"])
        return [
            place
            for place, message in messages
            if message["role"] == "assistant" and message.get("train", True) and message.get("weight", 1)
        ]

    def compare(self, number: int, count: int, ids: np.ndarray, has_loss: np.ndarray) -> Found:
        """Compare a chat of a batch, `ids` and `has_loss` `[seq]`, with the first `count` messages of its row."""
        found, row, trains = Found(), self.rows[number], self.trains(number)
        runs = list(self._runs(ids, has_loss))
        text = "".join(part for part, _ in runs)
        loss = np.concatenate([np.full(len(part), with_loss) for part, with_loss in runs])
        allowed = np.zeros(len(text), dtype=bool)
        before = at = 0
        for place, message in enumerate(row["messages"][:count]):
            span = self._find(message, text, loss, at, in_loss=place in trains)
            if span is None:
                continue
            before, at = at, span[1]
            if place in trains and loss[slice(*span)].any():
                after = self._next(row["messages"][place + 1 : count], text, loss, at)
                found.carried.append(place)
                allowed[before:after] = True
                whole = self._is_whole(message, span, text, loss, (before, after))
                found.faults["answers_partly_without_loss"] += not whole
        found.faults["other_texts_with_loss"] += bool((loss & ~allowed).any())
        found.faults["chats_unlike_their_row"] += self._ids(row, count) != ids.tolist()
        for tool in self._json(row.get("tools")) or []:
            name = tool.get("function", tool).get("name", "")
            stands = any(name in part for part, with_loss in runs if not with_loss)
            found.faults["tools_not_in_the_prompt"] += not stands
        return found

    def without_loss(self, carried: Collection[tuple[int, int]], numbers: Collection[int]) -> int:
        """How many answers of these rows must carry loss, and are not among those that did."""
        return sum((number, place) not in carried for number in numbers for place in self.trains(number))

    def _ids(self, row: Mapping[str, Any], count: int) -> list[int]:
        """The tokens of the row's first `count` messages as transformers renders it."""
        messages = []
        for message in row["messages"][:count]:
            messages.append({key: value for key, value in message.items() if key not in self.ignore})
            if calls := messages[-1].pop("tool_calls", None):
                messages[-1]["tool_calls"] = [self._call(call) for call in calls]
        options = self._json(row.get("chat_template_kwargs")) or {}
        tools, documents = (self._json(row.get(name)) or None for name in ("tools", "documents"))
        how = {"tools": tools, "documents": documents, "tokenize": True, "return_dict": True}
        return list(self.tokenizer.apply_chat_template(messages, **how, **options)["input_ids"])

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """A tool call whose arguments are a mapping."""
        function = dict(call.get("function", call))
        function["arguments"] = self._json(function.get("arguments"))
        return {**call, "function": function} if "function" in call else function

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
        content = message.get("content") or ""
        said = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        said = self._said(said) or next(iter(_names(message)), "")
        if not said:
            return None
        places = [found.start() for found in re.finditer(re.escape(said), text[at:])]
        spans = [(at + place, at + place + len(said)) for place in places]
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


def _names(message: Mapping[str, Any]) -> list[str]:
    """The names of the tools that a message calls."""
    return [call.get("function", call).get("name", "") for call in message.get("tool_calls") or []]
