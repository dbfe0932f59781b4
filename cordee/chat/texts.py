"""Texts that no chat template renders, in tokens: what the tokenizer makes of them, and its eos at their end."""

from typing import TYPE_CHECKING

import numpy as np

from cordee.chat.formats import Text, TextPair
from cordee.chat.problems import BadRowError
from cordee.chat.spans import Answer
from cordee.chat.templates import common_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(text: Text, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], Answer]:
    """The ids `[seq]` of a prompt and its completion as one text, and where the completion stands, its eos included.

    A text's first token is never predicted, and is no part of what carries loss.

    Raises:
        BadRowError: the completion is none, or nothing of the text is predicted.
    """
    if not text.completion.strip():
        raise BadRowError("an answer has no content", "completion")
    ids = ids_of(text.prompt + text.completion, tokenizer)
    end = len(ids)
    if tokenizer.eos_token_id is not None:
        is_ended = (text.prompt + text.completion).rstrip().endswith(tokenizer.eos_token)
        ids = ids if is_ended or ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        end = len(ids) - (ids[-1] == tokenizer.eos_token_id)
    first = max(1, common_length(ids, ids_of(text.prompt, tokenizer)))
    if len(ids) == 1:
        raise BadRowError("a text of one token, before which nothing stands that it could be predicted from")
    return ids, Answer(0, min(first, end), end, len(ids), trains=True)


def pair(text: TextPair, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int], list[int]]:
    """The ids of a prompt, and of either answer after it.

    Raises:
        BadRowError: the answers share no token, as the prompt is empty.
    """
    chosen, one = tokenize(Text(text.prompt, text.chosen), tokenizer)
    rejected, other = tokenize(Text(text.prompt, text.rejected), tokenizer)
    length = min(one.first, other.first, common_length(chosen, rejected))
    if not length:
        raise BadRowError("the prompt is empty: nothing stands before the answers' first tokens")
    return chosen[:length], chosen[length:], rejected[length:]


def has_loss(ids: list[int], answer: Answer) -> np.ndarray:
    """`[seq]`, bool: the completion."""
    places = np.arange(len(ids))
    return (places >= answer.first) & (places < answer.until)


def ids_of(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """A text in tokens; a begin-of-text token that it spells out itself is not written twice."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError("a text holds half of a surrogate pair, which is no character") from error
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not begins)["input_ids"])
