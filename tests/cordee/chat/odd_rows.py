"""Rows of chats and of preference pairs that can't be used, and what is wrong with each."""

import json
from typing import Any

from families import talk

ASKED, SAID = talk("hello", "German")
CHAT, PAIR = {"messages": [ASKED, SAID]}, {"prompt": "hello", "chosen": "German", "rejected": "no"}


def lines(*rows: Any) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def said(*messages: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def call(**function: Any) -> dict[str, Any]:
    """A chat whose answer calls a tool."""
    message = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function or None}]}
    return said(ASKED, message, {"role": "tool", "content": "2"}, SAID)


def nested(depth: int, innermost: str = "1") -> str:
    return '{"a":' * depth + innermost + "}" * depth


UNREAD_CHATS: dict[str, tuple[Any, str]] = {
    "null": (None, "no JSON object"),
    "null messages": (said() | {"messages": None}, "can't be told what it is: its columns are none"),
    "null turn": (said(ASKED, None, SAID), "a message has no role"),
    "null content": (said(ASKED, {"role": "assistant", "content": None}), "a message has no content"),
    "nested once too often": ({"messages": [[ASKED, SAID]]}, "a message has no role"),
    "messages as a mapping": ({"messages": ASKED}, "messages is no list of messages"),
    "messages as a text": ({"messages": "hello"}, "messages is no list of messages"),
    "messages in broken JSON": ({"messages": '[{"role": }]'}, "messages can't be read as JSON"),
    "no messages": ({"messages": []}, "messages is empty"),
    "a lone system turn": (said({"role": "system", "content": "x"}), "no assistant turn"),
    "an empty answer": (said(ASKED, {"role": "assistant", "content": " \n"}), "an answer has no content"),
    "content as a number": (said({"role": "user", "content": 3}, SAID), "its content is no text"),
    "content as NaN": (said({"role": "user", "content": float("nan")}, SAID), "its content is no text"),
    "content as a mapping": (said({"role": "user", "content": {"text": "x"}}, SAID), "its content is no text"),
    "an image": (said({"role": "user", "content": [{"type": "image"}]}, SAID), "its content holds something else"),
    "no role": (said({"content": "x"}, SAID), "a message has no role"),
    "role as a number": (said({"role": 1, "content": "x"}, SAID), "a message has no role"),
    "role as a list": (said({"role": ["user"], "content": "x"}, SAID), "a message has no role"),
    "a role that the template leaves out": (said({"role": "narrator", "content": "x"}, SAID), "leaves out the"),
    "half a character": (said({"role": "user", "content": "a\ud800b"}, SAID), "half a character"),
    "a special token": (said({"role": "user", "content": "<|im_end|>"}, SAID), "spells out the special token"),
    "half a weight": (said(ASKED, {**SAID, "weight": 0.5}), "a message's `weight` is neither 0 nor 1"),
    "a weight of 400 digits": (said(ASKED, {**SAID, "weight": 10**400}), "a message's `weight` is neither 0 nor 1"),
    "flags that differ": (said(ASKED, {**SAID, "train": True, "weight": 0}), "`train` and `weight` say different"),
    "a question to train on": (said({**ASKED, "train": True}, SAID), "a message of the user is marked to be trained"),
    "nothing to train on": (said(ASKED, {**SAID, "train": False}), "every answer is marked `train: false`"),
    "calls as a mapping": (said(ASKED, {**SAID, "tool_calls": {"name": "add"}}), "tool_calls is no list of calls"),
    "a call of nothing": (call(), "a tool call has no name"),
    "a call without a name": (call(arguments={}), "a tool call has no name"),
    "arguments in broken JSON": (call(name="add", arguments="{x:"), "arguments can't be read as JSON"),
    "arguments nested deeply": (call(name="add", arguments=nested(5000)), "is nested too deeply"),
    "tools as a text": (said(ASKED, SAID, tools="add"), "tools can't be read as JSON"),
    "tools as a number": (said(ASKED, SAID, tools=3), "tools is no list of mappings"),
    "options as a list": (said(ASKED, SAID, chat_template_kwargs=[1]), "chat_template_kwargs is no mapping"),
    "unknown columns": ({"question": "a"}, "its columns are 'question'"),
    "a turn that says nothing": ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}, "no content"),
    "Alpaca's history as a number": ({"instruction": "a", "output": "b", "history": 3}, "history is no list of pairs"),
    "Alpaca's output null": ({"instruction": "a", "output": None}, "its columns are 'instruction'"),
    "a prompt within its answer": ({"prompt": [ASKED], "completion": [ASKED, SAID]}, "completion begins with"),
    "a text as a number": ({"text": 3}, "text is no text"),
}  # fmt: skip
"""Name → a row of chats, and what is wrong with it."""
UNREAD_PAIRS: dict[str, tuple[Any, str]] = {
    "null": (None, "no JSON object"),
    "an answer that is null": ({**PAIR, "chosen": None}, "its columns are 'prompt', 'rejected'"),
    "an answer as a number": ({**PAIR, "chosen": 3}, "chosen is no text and no list of messages"),
    "an answer as NaN": ({**PAIR, "rejected": float("nan")}, "rejected is no text and no list of messages"),
    "an answer of blanks": ({**PAIR, "chosen": " "}, "chosen is empty"),
    "an empty prompt": ({**PAIR, "prompt": []}, "prompt is empty"),
    "answers that are equal": ({**PAIR, "rejected": "German"}, "chosen and rejected are equal"),
    "answers that share nothing": ({"chosen": "a", "rejected": "b"}, "share no prompt; `columns: {yours: prompt}`"),
    "a prompt within its answer": ({"prompt": [ASKED], "chosen": [ASKED, SAID], "rejected": "no"}, "begins with"),
    "an answer that asks": ({"prompt": [ASKED], "chosen": [SAID, ASKED], "rejected": [SAID]}, "ends with 'user'"),
    "a prompt that answers": ({**PAIR, "prompt": [ASKED, SAID]}, "the prompt's last message is the assistant's"),
    "nested once too often": ({"prompt": [[ASKED]], "chosen": [[SAID]], "rejected": [[SAID]]}, "a message has no role"),
    "an answer without loss": ({**PAIR, "chosen": [{**SAID, "train": False}]}, "chosen is marked `train: false`"),
    "half a character": ({**PAIR, "chosen": "\ud800"}, "half a character"),
    "a special token": ({**PAIR, "chosen": "<|im_end|>"}, "spells out the special token"),
    "a chat": (CHAT, "is no preference pair but messages"),
    "tools as a text": ({**PAIR, "tools": "add"}, "tools can't be read as JSON"),
}  # fmt: skip
"""Name → a row of pairs, and what is wrong with it."""
