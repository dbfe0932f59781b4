"""What the parity proof compares: the token ids of the same chats, and the log-probabilities of the same ids."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from cordee import files
from cordee.compute.logprobs import Scores
from cordee.errors import UserError

Chat = list[dict[str, str]]


def read(path: Path, rows: int) -> list[Chat]:
    """The first chats of a file, parquet or JSON lines; of a pair, the chosen answer.

    Raises:
        UserError: it can't be read, holds no chat, or one does not end with an answer.
    """
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path).slice(0, rows).to_pylist()
        else:
            table = files.read_rows(path)[:rows]
        chats = [row["messages"] if "messages" in row else [*row["prompt"], *row["chosen"]] for row in table]
        last = [chat[-1]["role"] for chat in chats]
    except (pa.ArrowException, KeyError, IndexError, TypeError) as error:
        raise UserError(f"holds no chats: {error!r}", file=path, key="prompts") from error
    if not last or set(last) != {"assistant"}:
        raise UserError("holds no chats that end with an answer", file=path, key="prompts")
    return chats


def encode(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], longest: int, path: Path) -> list[list[int]]:
    """The ids that training sees of each chat.

    Raises:
        UserError: one is longer than `longest` tokens.
    """
    encoded = []
    for number, chat in enumerate(chats, start=1):
        ids = list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"])
        if len(ids) > longest:
            raise UserError(f"row {number} has {len(ids)} tokens, and {longest} fit", file=path, key="max_length")
        encoded.append(ids)
    return encoded


def otherwise_in_vllm(llm: Any, chats: Sequence[Chat], trained: Sequence[list[int]]) -> int:
    """How many chats reach vLLM's model, by its own chat entrance, as other ids than training saw before the answer."""
    from vllm import SamplingParams

    outputs = llm.chat([chat[:-1] for chat in chats], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    sent = [list(output.prompt_token_ids) for output in outputs]
    return sum(ids[: len(own)] != own for own, ids in zip(sent, trained, strict=True))


def otherwise_in_lm_eval(lm: Any, chats: Sequence[Chat], trained: Sequence[list[int]], ends: Collection[int]) -> int:
    """How many chats and answers lm-eval encodes as other ids than training saw up to one of the `ends` of a turn."""
    differing = 0
    for chat, ids in zip(chats, trained, strict=True):
        own = list(lm.tok_encode(lm.apply_chat_template(chat[:-1]) + chat[-1]["content"]))
        differing += ids[: len(own)] != own or ids[len(own)] not in ends
    return differing


def apart(one: Sequence[Scores], other: Sequence[Scores]) -> float:
    """The largest difference of two log-probabilities of the same token, in nats."""
    return max(float((a.logprobs - b.logprobs).abs().max()) for a, b in zip(one, other, strict=True))


def agreement(one: Sequence[Scores], other: Sequence[Scores]) -> float:
    """The share of tokens at which both hold the same token most likely."""
    same = sum(int((a.top1 == b.top1).sum()) for a, b in zip(one, other, strict=True))
    return same / sum(len(a.top1) for a in one)
