"""What a row of chats or pairs says: each column is used, dropped as null, or refused by name.

Which roles, columns and keys there are is the chat template's to decide.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cordee.chat import formats
from cordee.chat.messages import TEXT_ONLY, read_messages, require_answer
from cordee.chat.problems import BadRowError
from cordee.chat.spelling import Message
from cordee.chat.templates import Template
from cordee.chat.values import from_text, says, texts_in, without_nulls
from cordee.errors import nearest

PAIR, ANSWER = ("prompt", "chosen", "rejected"), ("prompt", "completion")
OPTIONS = ("tools", "documents", "chat_template_kwargs")
"""Columns beside the messages that a template can be given."""
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
class Record:
    """A row and where it stands."""

    file: Path
    number: int
    """From 1: of JSON lines the line, as an editor counts them."""
    values: dict[str, Any]


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


@dataclass(frozen=True)
class Answered:
    """One row of a prompt with an answer, ready for the template."""

    file: Path
    number: int
    prompt: list[Message]
    completion: list[Message]
    options: dict[str, Any]


def chat(record: Record, template: Template, ignore: Collection[str] = ()) -> Chat:
    """The row as a chat; columns and message keys in `ignore` are left out.

    Raises:
        BadRowError: something in it can't be used, or nothing would be trained on.
    """
    options = _options(record, template, ignore, ("messages",))
    messages, flags = read_messages(record.values, "messages", template, options, ignore)
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
            require_answer(message, f"message {place}")
    return Chat(record.file, record.number, messages, trains, options)


def asked(record: Record, template: Template, ignore: Collection[str] = ()) -> Chat:
    """The row as a chat that is to be answered; columns and message keys in `ignore` are left out.

    Raises:
        BadRowError: something in it can't be used, or the template does not write it.
    """
    options = _options(record, template, ignore, ("messages",))
    messages, _ = read_messages(record.values, "messages", template, options, ignore)
    template.require_written(messages, options)
    return Chat(record.file, record.number, messages, (False,) * len(messages), options)


def pair(record: Record, template: Template, ignore: Collection[str] = ()) -> Pair:
    """The row as a preference pair; columns and message keys in `ignore` are left out.

    Raises:
        BadRowError: something in it can't be used, or there is nothing to prefer.
    """
    options = _options(record, template, ignore, PAIR)
    prompt = _prompt(record, template, options, ignore)
    chosen, rejected = (_side(record, column, prompt, template, options, ignore) for column in PAIR[1:])
    if chosen == rejected:
        raise BadRowError("chosen and rejected are equal: there is nothing to prefer")
    return Pair(record.file, record.number, prompt, chosen, rejected, options)


def answered(record: Record, template: Template, ignore: Collection[str] = ()) -> Answered:
    """The row as a prompt with an answer; columns and message keys in `ignore` are left out.

    Raises:
        BadRowError: something in it can't be used.
    """
    options = _options(record, template, ignore, ANSWER)
    prompt = _prompt(record, template, options, ignore)
    completion = _side(record, "completion", prompt, template, options, ignore)
    return Answered(record.file, record.number, prompt, completion, options)


def _prompt(record: Record, template: Template, options: dict[str, Any], ignore: Collection[str]) -> list[Message]:
    """The messages that are answered."""
    prompt, _ = read_messages(record.values, "prompt", template, options, ignore)
    if prompt[-1]["role"] == "assistant":
        raise BadRowError("the prompt's last message is the assistant's: there is nothing to answer")
    return prompt


def _side(
    record: Record,
    column: str,
    prompt: list[Message],
    template: Template,
    options: dict[str, Any],
    ignore: Collection[str],
) -> list[Message]:
    """The messages of an answer to a prompt, compared as a whole."""
    side, flags = read_messages(record.values, column, template, options, ignore, prompt)
    if side[-1]["role"] != "assistant":
        raise BadRowError(f"{column} ends with {side[-1]['role']!r}, not with the assistant")
    for place, message in enumerate(side, 1):
        if message["role"] == "assistant":
            require_answer(message, f"{column}, message {place}")
    if side[: len(prompt)] == prompt:
        raise BadRowError(formats.TWICE.format(column), hint="`ignore: [prompt]`, or take it out")
    if False in flags:
        raise BadRowError(f"{column} is marked `train: false`, and an answer is compared as a whole")
    return side


def chosen(record: Record, template: Template) -> Chat:
    """The row as a chat, or of a pair its prompt with the chosen answer, without what the template does not read.

    Raises:
        BadRowError: it is neither.
    """
    given = record.values
    is_pair = "chosen" in given and "messages" not in given and ("rejected" in given or "prompt" in given)
    if is_pair:  # one without a rejected answer has its prompt and the chosen one
        given = {"rejected": given["chosen"]} | given
    shaped = (formats.pair if is_pair else formats.chat)(given, as_text=False)
    if not isinstance(shaped, dict):
        raise BadRowError("is a text, and a chat is needed")
    record, columns = replace(record, values=shaped), ("prompt", "chosen") if is_pair else ("messages",)
    lists = [record.values[column] for column in columns if isinstance(record.values[column], list)]
    keys = {key for messages in lists for item in messages if isinstance(item, dict) for key in item}
    unread = {key for key in keys - {"role", "content"} if not template.reads(key)}
    used = {*columns, "chat_template_kwargs", *(template.variables & {*OPTIONS})}
    ignore = (unread | {"train", "weight"} | record.values.keys()) - used
    options = _options(record, template, ignore, columns)
    found = [
        message for column in columns for message in read_messages(record.values, column, template, options, ignore)[0]
    ]
    return Chat(record.file, record.number, found, tuple(message["role"] == "assistant" for message in found), options)


def other_columns(row: Mapping[str, Any], used: Collection[str], ignore: Collection[str]) -> set[str]:
    """Columns that hold something and are kept out: neither a template nor a loss knows them (`id`, `source`, …)."""
    return {name for name, value in row.items() if value is not None} - {*used, *OPTIONS, *ignore}


def _options(record: Record, template: Template, ignore: Collection[str], used: Collection[str]) -> dict[str, Any]:
    """What a row gives to the template besides messages.

    Raises:
        BadRowError: a column would change what is rendered or trained, and can't be used.
    """
    values = {name: without_nulls(value) for name, value in record.values.items() if name not in {*ignore, *used}}
    for name, value in values.items():
        if name in OPTIONS or not says(value) or (name in ("train", "weight") and value == 1):
            continue
        if name in ELSEWHERE:
            raise BadRowError(f"column {name!r} is not read", hint=ELSEWHERE[name])
        if name in template.parameters - RESERVED:
            hint = f"write it as chat_template_kwargs: {{{name}: …}}"
            raise BadRowError(f"column {name!r} is a variable of the chat template", hint=hint)
    given = {name: from_text(values.get(name), name) for name in OPTIONS}
    lists = {name: _mappings(given[name], name, template) for name in OPTIONS[:2] if says(given[name])}
    settings = given["chat_template_kwargs"] or {}
    if not isinstance(settings, dict):
        raise BadRowError("chat_template_kwargs is no mapping")
    for name in settings:
        if name in RESERVED or name not in template.variables:
            known = template.parameters - RESERVED
            hint = nearest(name, known) if known else ""
            raise BadRowError(f"chat_template_kwargs: the chat template takes no {name!r} there", hint=hint)
    return {**lists, **settings}


def _mappings(value: Any, name: str, template: Template) -> list[dict[str, Any]]:
    """Tools or documents: a list of mappings, each of which may be JSON text.

    Raises:
        BadRowError: it is anything else, or the template does not read it.
    """
    items = [without_nulls(from_text(item, name)) for item in value] if isinstance(value, list) else []
    if not items or not all(isinstance(item, dict) for item in items):
        raise BadRowError(f"{name} is no list of mappings")
    if name not in template.variables:
        raise BadRowError(f"has {name}, which the chat template does not read")
    template.require_plain(texts_in(items), name)
    return items
