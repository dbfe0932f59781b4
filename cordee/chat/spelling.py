"""The forms in which chat templates take the same messages: contents as texts or as lists of parts, calls with JSON."""

import json
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]


def spellings(messages: list[Message], *, takes_text: bool) -> list[list[Message]]:
    """The messages as a template may want them, the likeliest first.

    A content stays as it is (a text is a list of one part, where a template takes lists only), or is one text, or a
    list of one part: a template that reads no parts writes none of them, or the list as Python or JSON does; LLaVA's
    writes only the first of an answer. Arguments of tool calls are mappings, which OpenAI's format has as JSON text and
    most templates would quote again; DeepSeek's takes the text, beside a content of null.
    """
    has_lists = any(isinstance(message.get("content"), list) for message in messages)
    has_calls = any("tool_calls" in message for message in messages)
    if takes_text and not has_lists and not has_calls:
        return [messages]
    given = _as_given if takes_text else _as_parts
    contents = (given, joined, _as_part) if has_lists else (given,)
    found = [[_spelled(message, content) for message in messages] for content in contents]
    return [*found, list(map(_without_content, messages))] if has_calls else found


def joined(content: Any) -> str:
    """A message's content as one text."""
    return content if isinstance(content, str) else "".join(one["text"] for one in content)


def part(text: str) -> list[dict[str, str]]:
    """A text as a list of one part."""
    return [{"type": "text", "text": text}]


def _as_given(content: Any) -> Any:
    return content


def _as_parts(content: Any) -> Any:
    return part(content) if isinstance(content, str) else content


def _as_part(content: Any) -> Any:
    return part(joined(content))


def _spelled(message: Message, content: Callable[[Any], Any]) -> Message:
    """A message with its content in another form, and the arguments of its calls as mappings."""
    found = {**message, "content": content(message["content"])} if "content" in message else message
    return {**found, "tool_calls": list(map(_parsed, found["tool_calls"]))} if "tool_calls" in found else found


def _without_content(message: Message) -> Message:
    """A message that calls tools and says nothing, with a content of null and the arguments of its calls as JSON."""
    if "tool_calls" not in message or message.get("content"):
        return message
    return {**message, "content": None, "tool_calls": list(map(_as_json, message["tool_calls"]))}


def _parsed(call: Any) -> Any:
    return _with_arguments(call, lambda value: json.loads(value.strip() or "{}") if isinstance(value, str) else value)


def _as_json(call: Any) -> Any:
    return _with_arguments(
        call, lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    """A tool call with other arguments; where it has none, the call."""
    function = call.get("function", call)
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    changed = {**function, "arguments": change(function["arguments"])}
    return {**call, "function": changed} if "function" in call else changed
