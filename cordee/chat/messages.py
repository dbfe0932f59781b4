"""The messages of a row as the template takes them: each key is used, dropped as null, or refused by name."""

import contextlib
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from cordee.chat.problems import BadRowError
from cordee.chat.spelling import Message, joined
from cordee.chat.templates import LINKS, Template
from cordee.chat.turns import FROM
from cordee.chat.values import from_text, says, texts_in, without_nulls

TEXT_ONLY = "only text is trained on"


def read_messages(
    row: Mapping[str, Any],
    column: str,
    template: Template,
    options: dict[str, Any],
    ignore: Collection[str],
    before: list[Message] | None = None,
) -> tuple[list[Message], list[bool | None]]:
    """A column's messages as the template takes them, and whether each says that it is trained on.

    Raises:
        BadRowError: it holds anything that can't be used.
    """
    found = row[column]
    if not isinstance(found, list) or not found:
        raise BadRowError(f"{column} is {'empty' if found == [] else 'no list of messages'}")
    messages: list[Message] = []
    flags: list[bool | None] = []
    for place, item in enumerate(found, 1):
        where = f"message {place}" if column == "messages" else f"{column}, message {place}"
        if not isinstance(item, dict) or not isinstance(item.get("role"), str):
            raise BadRowError("a message has no role", where)
        message = {key: value for key, value in without_nulls(item).items() if key not in ignore}
        _require_role(message["role"], template, where)
        flags.append(_flag(message, where))
        _require_calls(message, template, where)
        _require_content(message, where)
        template.require_plain(texts_in({**message, "content": joined(message.get("content") or "")}), where)
        messages.append(message)
    whole = template.readable([*(before or []), *messages], options)
    messages = whole[-len(messages) :]
    for message in messages:
        for key in message:
            if not (key in ("role", "content") or template.reads(key) or not says(message[key])):
                _require_read(key, message, whole, template, options)
    return messages, flags


def _require_role(role: str, template: Template, where: str) -> None:
    """Refuse another word for the user or the assistant: many templates write any role, and the answer has no loss."""
    meant = FROM.get(role.lower())
    if meant in ("user", "assistant") and meant != role and not template.reads(role):
        raise BadRowError(f"the chat template knows no role {role!r}", where, f"write {meant!r}")


def _flag(message: Message, where: str) -> bool | None:
    """Take `train` and `weight` out of a message: whether it carries loss, None where it does not say."""
    said = {key: message.pop(key) for key in ("train", "weight") if key in message}
    for key, value in said.items():
        if value not in (0, 1):
            problem = f"a message's `{key}` is neither 0 nor 1: it carries loss or none"
            raise BadRowError(problem, f"{where}: {str(value)[:20]}")
    if len(set(map(bool, said.values()))) > 1:
        raise BadRowError("`train` and `weight` say different things", where)
    return bool(next(iter(said.values()))) if said else None


def _require_calls(message: Message, template: Template, where: str) -> None:
    """See that tool calls are a list, with arguments that are JSON where they are a text, as OpenAI's format has it."""
    if message.get("tool_calls") == []:  # some templates write a block of none
        del message["tool_calls"]
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRowError("tool_calls is no list of calls", where)
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRowError("a tool call has no name", where)
        if isinstance(function.get("arguments"), str):
            arguments = from_text(function["arguments"], "tool_calls: arguments", where)
            template.require_plain(texts_in(arguments), where)  # which JSON may spell with escapes


def _require_content(message: Message, where: str) -> None:
    """See that a message says something, as text or as a list of text parts; an empty text is one too."""
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise BadRowError("its content holds something else than text", where, TEXT_ONLY)
        if not all(isinstance(part.get("text"), str) for part in content):
            raise BadRowError("a part of its content has no text", where)
    elif content is not None and not isinstance(content, str):
        raise BadRowError("its content is no text", where)
    if content is None and not any(says(value) for key, value in message.items() if key not in ("role", *LINKS)):
        raise BadRowError("a message has no content", where)


def require_answer(message: Message, where: str) -> None:
    """See that an answer says something.

    Raises:
        BadRowError: it does not.
    """
    if not any(says(value) for key, value in message.items() if key != "role"):
        raise BadRowError("an answer has no content", where)


def _require_read(
    key: str, message: Message, whole: list[Message], template: Template, options: dict[str, Any]
) -> None:
    """Refuse a key that the template does not name, unless it writes whole messages: its text then differs without it.

    Raises:
        BadRowError: naming the key.
    """
    if message["role"] == "tool" and key in LINKS:
        return
    without = [{k: v for k, v in other.items() if other is not message or k != key} for other in whole]
    with contextlib.suppress(BadRowError):
        if template.text(whole, options) != template.text(without, options):
            return
    alike = [name for name in ("reasoning_content", "reasoning", "thinking", "tool_calls") if template.reads(name)]
    meant = difflib.get_close_matches(key, ["role", "content", "train", "weight", *alike], n=1)
    hint = f"rename it to {meant[0]!r}, or " if meant else ""
    hint += f"leave it out by `ignore: [{key}]` beside the file's path"
    raise BadRowError(f"the chat template does not read a message's {key!r}", hint=hint)
