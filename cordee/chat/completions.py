"""One prompt with one answer in tokens, as the answer was asked for and as preference pairs hold it."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from cordee.chat import schema, texts
from cordee.chat.formats import Text
from cordee.chat.problems import BadRowError
from cordee.chat.schema import Record
from cordee.chat.templates import OTHERWISE, Template, common_length

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
    chat = schema.chat(record, template, ignore)
    before = chat.messages[:-1]
    whole = template.text(chat.messages, chat.options)
    prompt = template.text(before, chat.options, add_generation_prompt=True)
    if not whole.startswith(prompt[: template.context(prompt, before, chat.options, [whole])]):
        raise BadRowError(OTHERWISE)
    asked, ids = template.encode([prompt, whole])["input_ids"]
    length = common_length(asked, ids)
    return ids[:length], ids[length:]


def of_text(prompt: str, completion: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The ids of a prompt, and of the text that continues it with the token that ends it.

    Raises:
        BadRowError: the completion is empty, or stands alone.
    """
    ids, answer = texts.tokenize(Text(prompt, completion), tokenizer)
    return ids[: answer.first], ids[answer.first :]


def _is_answer(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant"
