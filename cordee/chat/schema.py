"""What a row of chats or pairs says: each column and message key is used, dropped as null, or refused by name.

Nulls are no values, at any depth: Parquet fills every struct with the keys of all the others (TRL's
`remove_none_values` does the same). Which roles and keys there are is the chat template's to decide.
"""

import contextlib
import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee.chat.formats import BadRowError, Record, require
from cordee.chat.templates import LINKS, Message, Template
from cordee.errors import nearest

PAIR = ("prompt", "chosen", "rejected")
OPTIONS = ("tools", "documents", "chat_template_kwargs")
"""Columns beside the messages that a template can be given."""
TEXT_ONLY = "only text is trained on"
ELSEWHERE = {
    "system": "write it as the first message, with the role 'system'",
    "functions": "name it `tools`: a list of {type: function, function: {name, description, parameters}}",
    "train": "write it into the messages, where it says whether an answer carries loss",
    "weight": "write it into the messages, where it says whether an answer carries loss",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), TEXT_ONLY),
}
"""Columns that would change what is rendered or trained, and what to write instead."""
RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
"""Variables of a template that no `chat_template_kwargs` sets."""


@dataclass(frozen=True)
class Chat:
    """One row of chats, ready for the template."""

    file: Path
    number: int
    """Its row in the file, from 1."""
    messages: list[Message]
    trains: tuple[bool, ...]
    """For each message, whether it carries loss: the assistant's, unless marked `train: false` or `weight: 0`."""
    options: dict[str, Any]
    """What else the template is given: `tools`, `documents`, and the row's `chat_template_kwargs`."""


@dataclass(frozen=True)
class Pair:
    """One row of preference pairs, ready for the template."""

    file: Path
    number: int
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    options: dict[str, Any]


def chat(record: Record, template: Template, ignore: Collection[str] = ()) -> Chat:
    """The row as a chat; columns and message keys in `ignore` are left out.

    Raises:
        BadRowError: something in it can't be used, or nothing would be trained on.
    """
    options = _options(record, template, ignore, ("messages",))
    messages, flags = _messages(record, "messages", template, options, ignore)
    trains = tuple(
        message["role"] == "assistant" and flag is not False for message, flag in zip(messages, flags, strict=True)
    )
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(sorted({message["role"] for message in messages}))
        raise BadRowError("no assistant turn: nothing in it would be trained on", f"roles {roles}")
    if not any(trains):
        raise BadRowError("every answer is marked `train: false`: nothing in it would be trained on")
    for place, (message, flag) in enumerate(zip(messages, flags, strict=True), 1):
        if flag and message["role"] != "assistant":
            raise BadRowError(f"a message of the {message['role']} is marked to be trained on", f"message {place}")
        if trains[place - 1]:
            _require_answer(message, f"message {place}")
    return Chat(record.file, record.number, messages, trains, options)


def pair(record: Record, template: Template, ignore: Collection[str] = ()) -> Pair:
    """The row as a preference pair; columns and message keys in `ignore` are left out.

    Raises:
        BadRowError: something in it can't be used, or there is nothing to prefer.
    """
    options = _options(record, template, ignore, PAIR)
    prompt, _ = _messages(record, "prompt", template, options, ignore)
    if prompt[-1]["role"] == "assistant":
        raise BadRowError("the prompt's last message is the assistant's: there is nothing to answer")
    sides: list[list[Message]] = []
    for column in PAIR[1:]:
        side, flags = _messages(record, column, template, options, ignore, prompt)
        if side[-1]["role"] != "assistant":
            raise BadRowError(f"{column} ends with {side[-1]['role']!r}, not with the assistant")
        for place, message in enumerate(side, 1):
            if message["role"] == "assistant":
                _require_answer(message, f"{column}, message {place}")
        if side[: len(prompt)] == prompt:
            raise BadRowError(f"{column} begins with the prompt, which would then be there twice", hint="take it out")
        if False in flags:
            raise BadRowError(f"{column} is marked `train: false`, and a pair is compared as a whole")
        sides.append(side)
    if sides[0] == sides[1]:
        raise BadRowError("chosen and rejected are equal: there is nothing to prefer")
    return Pair(record.file, record.number, prompt, sides[0], sides[1], options)


def chosen(record: Record, template: Template) -> Chat:
    """The row as a chat, or of a pair its prompt with the chosen answer, without what the template does not read.

    Raises:
        BadRowError: it is neither.
    """
    columns = ("messages",) if "messages" in record.values else ("prompt", "chosen")
    if not record.values.keys() >= {*columns}:
        raise BadRowError("has neither `messages` nor `prompt` and `chosen`")
    lists = [record.values[column] for column in columns if isinstance(record.values[column], list)]
    keys = {key for messages in lists for item in messages if isinstance(item, dict) for key in item}
    unread = {key for key in keys - {"role", "content"} if not template.reads(key)}
    used = {*columns, "chat_template_kwargs", *(template.variables & {*OPTIONS})}
    ignore = (unread | {"train", "weight"} | record.values.keys()) - used
    options = _options(record, template, ignore, columns)
    found = [message for column in columns for message in _messages(record, column, template, options, ignore)[0]]
    return Chat(record.file, record.number, found, tuple(message["role"] == "assistant" for message in found), options)


def other_columns(records: Collection[Record], used: Collection[str], ignore: Collection[str]) -> list[str]:
    """Columns that hold something and are kept out: neither a template nor a loss knows them (`id`, `source`, …)."""
    found = {name for record in records for name, value in record.values.items() if value is not None}
    return sorted(found - {*used, *OPTIONS, *ignore})


def without_nulls(value: Any) -> Any:
    """A value without the keys whose value is null, at any depth; nulls that are items of a list stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _options(record: Record, template: Template, ignore: Collection[str], used: Collection[str]) -> dict[str, Any]:
    """What a row gives to the template besides messages.

    Raises:
        BadRowError: a column would change what is rendered or trained, and can't be used.
    """
    values = {name: without_nulls(value) for name, value in record.values.items() if name not in ignore}
    for column in used:
        require(values, column)
    for name, value in values.items():
        if name in (*used, *OPTIONS) or not _says(value) or (name in ("train", "weight") and value == 1):
            continue
        if name in ELSEWHERE:
            raise BadRowError(f"column {name!r} is not read", hint=ELSEWHERE[name])
        if name in template.parameters - RESERVED:
            hint = f"write it as chat_template_kwargs: {{{name}: …}}"
            raise BadRowError(f"column {name!r} is a variable of the chat template", hint=hint)
    given = {name: _from_text(values.get(name), name) for name in OPTIONS}
    lists = {name: _mappings(given[name], name, template) for name in OPTIONS[:2] if _says(given[name])}
    settings = given["chat_template_kwargs"] or {}
    if not isinstance(settings, dict):
        raise BadRowError("chat_template_kwargs is no mapping")
    for name in settings:
        if name in RESERVED or name not in template.variables:
            hint = nearest(name, template.parameters - RESERVED)
            raise BadRowError(f"chat_template_kwargs: the chat template takes no {name!r} there", hint=hint)
    return {**lists, **settings}


def _mappings(value: Any, name: str, template: Template) -> list[dict[str, Any]]:
    """Tools or documents: a list of mappings, each of which may be JSON text.

    Raises:
        BadRowError: it is anything else, or the template does not read it.
    """
    items = [without_nulls(_from_text(item, name)) for item in value] if isinstance(value, list) else []
    if not items or not all(isinstance(item, dict) for item in items):
        raise BadRowError(f"{name} is no list of mappings")
    if name not in template.variables:
        raise BadRowError(f"has {name}, which the chat template does not read")
    template.require_plain(_texts(items), name)
    return items


def _messages(
    record: Record,
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
    found = record.values[column]
    if not isinstance(found, list) or not found:
        raise BadRowError(f"{column} is {'empty' if found == [] else 'no list of messages'}")
    messages: list[Message] = []
    flags: list[bool | None] = []
    for place, item in enumerate(found, 1):
        where = f"message {place}" if column == "messages" else f"{column}, message {place}"
        if not isinstance(item, dict) or not isinstance(item.get("role"), str):
            raise BadRowError("a message has no role", where)
        message = {key: value for key, value in without_nulls(item).items() if key not in ignore}
        flags.append(_flag(message, where))
        _parse_calls(message, where)
        _require_content(message, where)
        template.require_plain(_texts(message), where)
        messages.append(message)
    whole = [*(before or []), *messages]
    for message in messages:
        for key in message:
            if not (key in ("role", "content") or template.reads(key) or not _says(message[key])):
                _require_read(key, message, whole, template, options)
    return messages, flags


def _flag(message: Message, where: str) -> bool | None:
    """Take `train` and `weight` out of a message: whether it carries loss, None where it does not say."""
    said = {key: message.pop(key) for key in ("train", "weight") if key in message}
    for key, value in said.items():
        if value not in (0, 1):
            raise BadRowError(f"`{key}: {value}` can't be used: a message carries loss or none", where, "write 0 or 1")
    if len(set(map(bool, said.values()))) > 1:
        raise BadRowError("`train` and `weight` say different things", where)
    return bool(next(iter(said.values()))) if said else None


def _parse_calls(message: Message, where: str) -> None:
    """Arguments of tool calls as mappings: OpenAI's format has them as JSON text, which templates would quote again."""
    if message.get("tool_calls") == []:  # some templates write a block of none
        del message["tool_calls"]
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRowError("tool_calls is no list of calls", where)
    for call in calls:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _from_text(function["arguments"], "tool_calls: arguments", where)


def _require_content(message: Message, where: str) -> None:
    """See that a message says something, as text or as a list of text parts; an empty text is one too."""
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise BadRowError("its content holds something else than text", where, TEXT_ONLY)
    elif content is not None and not isinstance(content, str):
        raise BadRowError("its content is no text", where)
    if content is None and not any(_says(value) for key, value in message.items() if key not in ("role", *LINKS)):
        raise BadRowError("a message has no content", where)


def _require_answer(message: Message, where: str) -> None:
    """See that an answer says something."""
    if not any(_says(value) for key, value in message.items() if key != "role"):
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
    meant = difflib.get_close_matches(key, alike, n=1)
    hint = f"rename it to {meant[0]!r}, or " if meant else ""
    hint += f"leave it out by `ignore: [{key}]` beside the file's path"
    raise BadRowError(f"the chat template does not read a message's {key!r}", hint=hint)


def _from_text(value: Any, name: str, where: str = "") -> Any:
    """A value that may be JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise BadRowError(f"{name} can't be read as JSON", where or str(error)) from error


def _says(value: Any) -> bool:
    """Whether a value holds anything: text that is not blank, a number, a truth value, or a collection of these."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(_says, value.values()))
    if isinstance(value, list):
        return any(map(_says, value))
    return value is not None


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, keys of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (key, *_texts(item))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
