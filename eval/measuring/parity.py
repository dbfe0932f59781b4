"""What the parity proof compares: the token ids of the same chats, and the log-probabilities of the same ids."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from cordee.chat import conversations
from cordee.chat.schema import Chat
from cordee.chat.source import Limits
from cordee.chat.templates import Template
from cordee.compute.tokenizer import PROBE, open_tokenizer
from cordee.errors import UserError


def read(path: Path | None, rows: int, model: Path, longest: int) -> tuple[list[Chat], list[list[int]]]:
    """The first chats of a file, of a pair the prompt with the chosen answer, and their ids by a model's tokenizer.

    Without a file they are texts of ours, each as a question and its answer; those that are longer are left out.

    Raises:
        UserError: it can't be read, holds no chats that end with an answer, or one is longer than `longest` tokens.
    """
    tokenizer = open_tokenizer(model)
    if path is None:
        template = Template(tokenizer)
        asked = [[{"role": role, "content": text.strip()} for role in ("user", "assistant")] for text in PROBE]
        chats = [Chat(Path(), at, template.readable(one, {}), (False, True), {}) for at, one in enumerate(asked, 1)]
        whole: list[list[int]] = template.encode([template.text(chat.messages, {}) for chat in chats])["input_ids"]
        fitting = [(chat, ids) for chat, ids in zip(chats, whole, strict=True) if len(ids) <= longest]
        return [chat for chat, _ in fitting], [ids for _, ids in fitting]
    found = conversations.first(path, rows, Template(tokenizer), Limits(longest, None, len(tokenizer)))
    if {chat.messages[-1]["role"] for chat, _ in found} != {"assistant"}:
        raise UserError("holds no chats that end with an answer", file=path, key="prompts")
    return [chat for chat, _ in found], [ids for _, ids in found]


def encoded_differently_by_vllm(llm: Any, chats: Sequence[Chat], trained: Sequence[list[int]]) -> int:
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


def encoded_differently_by_lm_eval(
    lm: Any, chats: Sequence[Chat], trained: Sequence[list[int]], ends: Collection[int]
) -> int:
    """How many chats and answers lm-eval encodes as other ids than training saw before what ends a turn: the `ends`.

    Chats with tools or settings of their own, and answers that call tools, are none of lm-eval's.
    """
    differing = 0
    for chat, ids in zip(chats, trained, strict=True):
        answer = chat.messages[-1].get("content")
        if not chat.options and isinstance(answer, str) and len(chat.messages[-1]) == 2:
            own = list(lm.tok_encode(lm.apply_chat_template(chat.messages[:-1]) + answer))
            behind = ids[len(own) :]  # nothing, where a template ends no answer but by the next turn
            differing += ids[: len(own)] != own or (behind != [] and not {*ends}.intersection(behind))
    return differing
