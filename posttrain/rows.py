"""Chats, read and turned into token rows; a row that would train the wrong thing stops the run before it starts.

Where loss stands is found twice: by transformers from the template's `{% generation %}` marks (that is trained on),
and by rendering each chat up to each of its answers (that is what it must be). The two must agree in every row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cordee.compute.tokenizer import special_tokens
from cordee.errors import UserError
from posttrain import reading

IGNORED = -100
BATCH_ROWS = 1000


@dataclass(frozen=True)
class Row:
    """One chat in tokens."""

    file: Path
    number: int
    """Its row in the file, from 1."""
    ids: np.ndarray
    """`[length]`, int32."""
    has_loss: np.ndarray
    """`[length]`, bool: what transformers says is the assistant's."""
    turns: tuple[tuple[int, int], ...]
    """Where each answer must carry loss: first token, and one past its end-of-turn."""

    @property
    def must_have_loss(self) -> np.ndarray:
        """`[length]`, bool: each answer with its end-of-turn, and nothing else."""
        must = np.zeros_like(self.has_loss)
        for first, until in self.turns:
            must[first:until] = True
        return must

    @property
    def labels(self) -> np.ndarray:
        """`[length]`: the token where it carries loss, else -100."""
        return np.where(self.has_loss, self.ids, IGNORED)


@dataclass(frozen=True)
class Stops:
    """The tokens that begin a chat and that end an answer."""

    begin: int | None
    """The beginning-of-sequence token, for a tokenizer that has one."""
    end: frozenset[int]
    """The tokens at which generation stops."""

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Stops":
        """As the model's generation config and the tokenizer have them."""
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        return cls(tokenizer.bos_token_id, frozenset({*ends, tokenizer.eos_token_id} - {None}))


def tokenize(file: Path, tokenizer: PreTrainedTokenizerBase, stops: Stops, max_length: int) -> list[Row]:
    """Read a file's chats, turn them into tokens and check every one.

    Raises:
        UserError: naming file and row, where what would be trained is not each answer with its end-of-turn and
            nothing else, or where a chat is longer than `max_length` tokens.
    """
    specials = special_tokens(tokenizer)
    chats = []
    for row in reading.read(file, ["messages"]):
        chats.append(row.messages("messages", specials))
        if all(message["role"] != "assistant" for message in chats[-1]):
            raise row.wrong("no assistant turn: nothing in it would be trained on")
    rows: list[Row] = []
    for start in range(0, len(chats), BATCH_ROWS):
        rows += _tokenize_batch(chats[start : start + BATCH_ROWS], start, file, tokenizer, stops)
    for row in rows:
        if problem := next(problems(row, stops, max_length), ""):
            raise UserError(problem, file=row.file, key=f"row {row.number}")
    return rows


def _tokenize_batch(
    chats: Sequence[reading.Messages], start: int, file: Path, tokenizer: PreTrainedTokenizerBase, stops: Stops
) -> Iterator[Row]:
    """Rows of some chats; their `turns` come from rendering each chat up to each of its answers."""
    trained = tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    answers = [(n, turn) for n, chat in enumerate(chats) for turn, m in enumerate(chat) if m["role"] == "assistant"]
    prompts = _ids([chats[n][:turn] for n, turn in answers], tokenizer, add_generation_prompt=True)
    turns: list[list[tuple[int, int]]] = [[] for _ in chats]
    for (n, turn), prompt in zip(answers, prompts, strict=True):
        ids, place = trained["input_ids"][n], {"file": file, "key": f"row {start + n + 1}"}
        if ids[: len(prompt)] != prompt:
            raise UserError(f"the chat template renders message {turn + 1} otherwise when more follows", **place)
        end = next((at for at in range(len(prompt), len(ids)) if ids[at] in stops.end), None)
        if end is None:
            problem = "an answer ends with no token at which generation stops"
            raise UserError(problem, **place, hint="name the end-of-turn token in generation_config.json: eos_token_id")
        turns[n].append((len(prompt), end + 1))
    for n, ids in enumerate(trained["input_ids"]):
        mask = np.array(trained["assistant_masks"][n], dtype=bool)
        yield Row(file, start + n + 1, np.array(ids, dtype=np.int32), mask, tuple(turns[n]))


def _ids(chats: list[reading.Messages], tokenizer: PreTrainedTokenizerBase, **how: Any) -> list[list[int]]:
    """The token ids of chats."""
    return tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True, **how)["input_ids"]


def problems(row: Row, stops: Stops, max_length: int) -> Iterator[str]:
    """What is wrong with a chat in tokens."""
    if len(row.ids) > max_length:
        yield f"{len(row.ids)} tokens are more than trainer.max_length={max_length}; raise it, or drop the row"
    if stops.begin is not None and (np.count_nonzero(row.ids == stops.begin) != 1 or row.ids[0] != stops.begin):
        yield f"{np.count_nonzero(row.ids == stops.begin)} beginning-of-sequence tokens, not one at the start"
    if not row.has_loss.any():
        yield "no token would be trained on: does the chat template mark answers with {% generation %}?"
    if not all(row.has_loss[until - 1] for _, until in row.turns):
        yield "the end-of-turn token carries no loss: the model would never learn to stop"
    if (wrong := row.has_loss & ~row.must_have_loss).any():
        yield f"token {int(np.argmax(wrong))} of the prompt carries loss"
    if (wrong := row.must_have_loss & ~row.has_loss).any():
        yield f"token {int(np.argmax(wrong))} of an answer carries no loss"


def weigh(rows: list[Row], weight: float, seed: int) -> list[Row]:
    """Each row `weight` times: whole copies, and a random share of the rows for the fraction."""
    whole, share = divmod(weight, 1.0)
    some = np.random.default_rng(seed).permutation(len(rows))[: round(share * len(rows))]
    return rows * int(whole) + [rows[place] for place in sorted(some)]


def dataset(rows: Sequence[Row]) -> Dataset:
    """Rows as TRL takes them when they are tokens already: `input_ids` and `labels`."""
    offsets = pa.array(np.cumsum([0, *(len(row.ids) for row in rows)]), pa.int32())
    columns = {
        "input_ids": pa.array(np.concatenate([row.ids for row in rows]), pa.int64()),
        "labels": pa.array(np.concatenate([row.labels for row in rows]), pa.int64()),
    }
    return Dataset(pa.table({name: pa.ListArray.from_arrays(offsets, flat) for name, flat in columns.items()}))
