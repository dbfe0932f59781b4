"""Messages out of what a column holds: a list of messages or of ShareGPT's turns, JSON text of one, a string."""

import json
import re
from collections.abc import Mapping
from typing import Any

from cordee.chat.problems import BadRowError

FROM = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard", "claude", "gemini"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}
"""ShareGPT's `from`, in any case → role; any other is the role itself."""
CALLS = ("function_call", "tool_call")
"""ShareGPT's `from` of a call to a tool, whose value is JSON text."""
LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
Values = dict[str, Any]


def messages(value: Any, column: str) -> Any:
    """A column's messages: as they are, from ShareGPT's turns, or from JSON text of either."""
    if isinstance(value, str) and LIST_OF_OBJECTS.match(value):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRowError(f"{column} can't be read as JSON", str(error)) from error
    if not isinstance(value, list):
        return value
    return [
        _turn(item) if isinstance(item, Mapping) and "role" not in item and "from" in item else item for item in value
    ]


def _turn(item: Mapping[str, Any]) -> Values:
    """A turn of ShareGPT as a message; its further keys stay."""
    rest = {name: value for name, value in item.items() if name not in ("from", "value")}
    said, content = item["from"], item.get("value")
    said = said.lower() if isinstance(said, str) else said  # ShareGPT's own export writes `Human`
    if said in CALLS:
        try:
            calls = json.loads(content) if isinstance(content, str) else content
        except ValueError as error:
            raise BadRowError(f"the value of a turn from {said!r} can't be read as JSON") from error
        calls = calls if isinstance(calls, list) else [calls]
        return rest | {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return rest | {"role": FROM.get(said, said) if isinstance(said, str) else said, "content": content}


def side(value: Any, role: str, column: str) -> list[Any]:
    """A prompt or an answer as messages; a string is one message of the role."""
    found = value if isinstance(value, str) and not is_chat(value) else messages(value, column)
    if isinstance(found, str):
        if not found.strip():
            raise BadRowError(f"{column} is empty")
        return [{"role": role, "content": found}]
    if isinstance(found, Mapping):
        return side([found], role, column)
    if not isinstance(found, list) or not found:
        raise BadRowError(f"{column} is {'empty' if found == [] else 'no text and no list of messages'}")
    return found


def alpaca(rest: Values) -> list[Any]:
    """Alpaca's columns as turns; `input` follows `instruction` on a line of its own."""
    asked, given, said = rest.pop("instruction"), rest.pop("input", None), rest.pop("output")
    history = rest.pop("history", None) or []
    for name, value in (("instruction", asked), ("input", given), ("output", said)):
        if not isinstance(value, str) and not (name == "input" and value is None):
            raise BadRowError(f"{name} is no text")
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRowError("history is no list of pairs")
    question = "\n".join(part for part in (asked, given) if part)
    turns = [*history, [question, said]]
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def begins(found: list[Any], role: str) -> bool:
    """Whether messages begin with one of a role."""
    return bool(found) and isinstance(found[0], Mapping) and found[0].get("role") == role


def is_chat(text: str) -> bool:
    """Whether a text is JSON of a list of messages or turns, and not an answer in JSON."""
    try:
        found = json.loads(text) if LIST_OF_OBJECTS.match(text) else None
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in found)
    )
