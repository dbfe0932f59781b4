"""What the parity proof compares: the token ids of the same chats, and the log-probabilities of the same ids."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from cordee.chat import conversations
from cordee.chat.formats import Limits
from cordee.chat.schema import Chat
from cordee.chat.templates import Template
from cordee.compute.logprobs import Scores
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import UserError


def read(path: Path, rows: int, model: Path, longest: int) -> tuple[list[Chat], list[list[int]]]:
    """The first chats of a file, of a pair the prompt with the chosen answer, and their ids by a model's tokenizer.

    Raises:
        UserError: it can't be read, holds no chats that end with an answer, or one is longer than `longest` tokens.
    """
    tokenizer = open_tokenizer(model)
    found = conversations.first(path, rows, Template(tokenizer), Limits(longest, None, len(tokenizer)))
    if {chat.messages[-1]["role"] for chat, _ in found} != {"assistant"}:
        raise UserError("holds no chats that end with an answer", file=path, key="prompts")
    return [chat for chat, _ in found], [ids for _, ids in found]


def otherwise_in_vllm(llm: Any, chats: Sequence[Chat], trained: Sequence[list[int]]) -> int:
    """How many chats reach vLLM's model, by its own chat entrance, as other ids than training saw before the answer."""
    from vllm import SamplingParams

    differing = 0
    for chat, ids in zip(chats, trained, strict=True):
        settings = {name: value for name, value in chat.options.items() if name != "tools"}
        (output,) = llm.chat(
            chat.messages[:-1], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False,
            tools=chat.options.get("tools"), chat_template_kwargs=settings or None,
        )  # fmt: skip
        own = list(output.prompt_token_ids)
        differing += ids[: len(own)] != own
    return differing


def otherwise_in_lm_eval(lm: Any, chats: Sequence[Chat], trained: Sequence[list[int]], ends: Collection[int]) -> int:
    """How many chats and answers lm-eval encodes as other ids than training saw up to one of the `ends` of a turn.

    Chats with tools or settings of their own, and answers that call tools, are none of lm-eval's.
    """
    differing = 0
    for chat, ids in zip(chats, trained, strict=True):
        answer = chat.messages[-1].get("content")
        if not chat.options and isinstance(answer, str) and len(chat.messages[-1]) == 2:
            own = list(lm.tok_encode(lm.apply_chat_template(chat.messages[:-1]) + answer))
            differing += ids[: len(own)] != own or ids[len(own)] not in ends
    return differing


def apart(one: Sequence[Scores], other: Sequence[Scores]) -> float:
    """The largest difference of two log-probabilities of the same token, in nats."""
    return max(float((a.logprobs - b.logprobs).abs().max()) for a, b in zip(one, other, strict=True))


def agreement(one: Sequence[Scores], other: Sequence[Scores]) -> float:
    """The share of tokens at which both hold the same token most likely."""
    same = sum(int((a.top1 == b.top1).sum()) for a, b in zip(one, other, strict=True))
    return same / sum(len(a.top1) for a in one)
