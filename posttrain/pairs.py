"""Preference pairs, read and turned into tokens; a pair that would train the wrong thing stops the run.

A *pair* is a prompt with a chosen and a rejected side, each a list of messages. The *prompt ids* end where the
assistant begins to speak; each side's ids go from there to the end of its turn.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from cordee.errors import Fault, UserError, nearest
from posttrain.rows import Stops

COLUMNS = ("prompt", "chosen", "rejected")
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    """One row of a data file and where it stands."""

    file: Path
    number: int
    """From 0."""
    values: dict[str, Any]

    def wrong(self, problem: str, hint: str = "") -> UserError:
        """The error that says what is wrong with this row."""
        return UserError(problem, file=self.file, key=f"row {self.number}", hint=hint)


@dataclass(frozen=True)
class Pair:
    """A pair as the model reads it: token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """Tokens that one pass over the pair reads: the prompt stands before either side."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def read(path: Path, columns: Sequence[str], key: str) -> list[Row]:
    """The rows of a parquet or JSON lines file, with the columns asked for.

    Raises:
        UserError: the file is neither, can't be read, is empty, or lacks a column.
    """
    if path.suffix == ".parquet":
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"can't be read as parquet: {error}", file=path, key=key) from error
        values = table.to_pylist()
    elif path.suffix in (".jsonl", ".json"):
        values = _json_lines(path)
    else:
        raise UserError("is neither .parquet nor .jsonl", file=path, key=key)
    if not values:
        raise UserError("holds no rows", file=path, key=key)
    rows = [Row(path, number, value) for number, value in enumerate(values)]
    for row in rows:
        for column in columns:
            if column not in row.values:
                raise row.wrong(f"has no column {column!r}", nearest(column, row.values))
    return rows


def _json_lines(path: Path) -> list[dict[str, Any]]:
    values = []
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"is no JSON: {error}", file=path, key=f"row {number}") from error
        if not isinstance(value, dict):
            raise UserError("is no JSON object", file=path, key=f"row {number}")
        values.append(value)
    return values


def tokenize(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, stops: Stops, max_length: int) -> list[Pair]:
    """Turn rows into pairs of token ids.

    Raises:
        UserError: a row is malformed, says nothing, has equal sides, is longer than `max_length` tokens, or the
            template renders it so that the model would learn another text than it will meet.
    """
    if not tokenizer.chat_template:
        raise UserError("its tokenizer has no chat template", key="model")
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    forged = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
    pairs = []
    for row in rows:
        for column in COLUMNS:
            check_messages(row, column, forged)
        if row.values["prompt"][-1]["role"] == "assistant":
            raise row.wrong("the prompt's last message is the assistant's: there is nothing to answer")
        if row.values["chosen"] == row.values["rejected"]:
            raise row.wrong("chosen and rejected are equal: there is nothing to prefer")
        for extra in ("tools", "chat_template_kwargs"):
            if row.values.get(extra):
                raise row.wrong(f"holds {extra!r}, which is not read", "put it into the messages")
        pair = _pair(row, tokenizer, stops)
        if pair.longest > max_length:
            raise row.wrong(
                f"is {pair.longest} tokens long, more than {max_length}: nothing is cut off in silence",
                "raise trainer.max_length or leave the row out",
            )
        pairs.append(pair)
    return pairs


def conversations(path: Path, count: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """The token ids of the first `count` conversations of a file of chats (`messages`) or of pairs (the chosen side).

    Raises:
        UserError: the file holds neither, or one is longer than `max_length` tokens.
    """
    rows = read(path, (), "prompts")[:count]
    sequences = []
    for row in rows:
        if "messages" in row.values:
            messages = row.values["messages"]
        elif {"prompt", "chosen"} <= set(row.values):
            messages = [*row.values["prompt"], *row.values["chosen"]]
        else:
            raise row.wrong("has neither `messages` nor `prompt` and `chosen`")
        ids = render(row, tokenizer, messages)
        if not 2 <= len(ids) <= max_length:
            raise row.wrong(f"is {len(ids)} tokens long: it needs 2 to {max_length}")
        sequences.append(ids)
    return sequences


def check_messages(row: Row, column: str, forged: re.Pattern[str]) -> None:
    """Check one list of messages: roles and text; `forged` finds special tokens, which no text may spell out.

    Raises:
        UserError: it is no list of messages, says nothing, or holds a special token.
    """
    messages = row.values[column]
    if not isinstance(messages, list) or not messages:
        raise row.wrong(f"{column} is no list of messages" if messages else f"{column} is empty")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or not message.get("role"):
            raise row.wrong(f"{column} holds a message without a role or without text")
        if not message["content"].strip():
            raise row.wrong(f"{column} holds an empty message")
        if found := forged.search(message["content"]):
            raise row.wrong(f"{column} spells out the special token {found.group()!r}")
    if column in ("chosen", "rejected") and messages[-1]["role"] != "assistant":
        raise row.wrong(f"{column} ends with {messages[-1]['role']!r}, not with the assistant")


def _pair(row: Row, tokenizer: PreTrainedTokenizerBase, stops: Stops) -> Pair:
    """Render a row and check what was rendered: one start, the prompt unchanged, an end to each side."""
    prompt = render(row, tokenizer, row.values["prompt"], add_generation_prompt=True)
    sides = {}
    for column in ("chosen", "rejected"):
        whole = render(row, tokenizer, [*row.values["prompt"], *row.values[column]])
        if stops.begin is not None and (whole.count(stops.begin) != 1 or whole[0] != stops.begin):
            raise row.wrong(f"{whole.count(stops.begin)} beginning-of-sequence tokens, not one at the start")
        if whole[: len(prompt)] != prompt:
            raise row.wrong(
                f"the template renders the prompt alone and before {column} as different tokens: the model would be "
                "trained after another text than it is asked with"
            )
        sides[column] = whole[len(prompt) :]
        if not stops.end & set(sides[column][-2:]):  # a template may end the turn with a newline
            raise row.wrong(
                f"{column} has no end of turn: the model would not learn to stop",
                "mend the chat template, or eos_token_id in generation_config.json",
            )
    if sides["chosen"] == sides["rejected"]:
        raise row.wrong("chosen and rejected are the same tokens: there is nothing to prefer")
    return Pair(prompt, sides["chosen"], sides["rejected"])


def render(row: Row, tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> list[int]:
    """The token ids of a list of messages.

    Raises:
        UserError: the template refuses them.
    """
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])
    except Exception as error:  # a template raises jinja2's errors, and whatever its filters raise
        raise row.wrong(f"the chat template refuses it: {error}") from error


def require_same(pairs: Sequence[Pair], trained: Any) -> None:
    """Check that the trainer's dataset holds the pairs that were checked here, none dropped, none cut.

    Raises:
        Fault: it does not.
    """
    if len(trained) != len(pairs):
        raise Fault(f"the trainer holds {len(trained)} of {len(pairs)} pairs")
    for number, (pair, theirs) in enumerate(zip(pairs, trained, strict=True), start=1):
        if (theirs["prompt_ids"], theirs["chosen_ids"], theirs["rejected_ids"]) != (
            pair.prompt, pair.chosen, pair.rejected,
        ):  # fmt: skip
            raise Fault(f"pair {number} stands in the trainer with other tokens than were checked")
