"""One prompt with one answer in tokens, as the answer was asked for and as preference pairs hold it."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cordee.chat import pairs, schema, texts
from cordee.chat.formats import Text
from cordee.chat.problems import BadRowError, Notes
from cordee.chat.schema import Record
from cordee.chat.templates import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def of_chat(record: Record, template: Template, ignore: Collection[str] = ()) -> tuple[list[int], list[int]]:
    """The ids of a chat up to its last answer, and of that answer with all that the template writes behind it.

    Args:
        record: a row with `messages`, the last of which is the answer.
        template: the chat template.
        ignore: columns and keys of messages that are left out.

    Raises:
        BadRowError: something in it can't be used, or the answer is none.
    """
    messages = record.values["messages"]
    if not isinstance(messages, list) or not messages or not _is_answer(messages[-1]):
        raise BadRowError("has no answer: its last message is not the assistant's")
    others = {name: value for name, value in record.values.items() if name != "messages"}
    values = others | {"prompt": messages[:-1], "completion": messages[-1:]}
    one = schema.answered(replace(record, values=values), template, ignore)
    sides = {"completion": one.completion}
    prompt, (completion,) = pairs.rendered(one.prompt, sides, one.options, template, Notes())
    return prompt, completion


def of_text(prompt: str, completion: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The ids of a prompt, and of the text that continues it with the token that ends it.

    Raises:
        BadRowError: the completion is empty, or stands alone.
    """
    ids, answer = texts.tokenize(Text(prompt, completion), tokenizer)
    return ids[: answer.first], ids[answer.first :]


def _is_answer(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant"
