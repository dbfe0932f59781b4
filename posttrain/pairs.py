"""Preference pairs, read and turned into tokens; a pair that would train the wrong thing stops the run.

A *pair* is a prompt with a chosen and a rejected side, each a list of messages. The *prompt ids* end where the
assistant begins to speak; each side's ids go from there to the end of its turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cordee.compute.tokenizer import special_tokens
from cordee.errors import Fault, UserError
from posttrain.reading import Messages, Record, read
from posttrain.rows import Stops

COLUMNS = ("prompt", "chosen", "rejected")


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


def tokenize(rows: Sequence[Record], tokenizer: PreTrainedTokenizerBase, stops: Stops, max_length: int) -> list[Pair]:
    """Turn rows into pairs of token ids.

    Raises:
        UserError: a row is malformed, says nothing, has equal sides, is longer than `max_length` tokens, or the
            template renders it so that the model would learn another text than it will meet.
    """
    if not tokenizer.chat_template:
        raise UserError("its tokenizer has no chat template", key="model")
    specials = special_tokens(tokenizer)
    pairs = []
    for row in rows:
        prompt, chosen, rejected = (row.messages(column, specials) for column in COLUMNS)
        if prompt[-1]["role"] == "assistant":
            raise row.wrong("the prompt's last message is the assistant's: there is nothing to answer")
        for column, side in (("chosen", chosen), ("rejected", rejected)):
            if side[-1]["role"] != "assistant":
                raise row.wrong(f"{column} ends with {side[-1]['role']!r}, not with the assistant")
        if chosen == rejected:
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
    specials = special_tokens(tokenizer)
    sequences = []
    for row in read(path, ())[:count]:
        columns = ["messages"] if "messages" in row.values else ["prompt", "chosen"]
        if not row.values.keys() >= set(columns):
            raise row.wrong("has neither `messages` nor `prompt` and `chosen`")
        messages = [message for column in columns for message in row.messages(column, specials)]
        ids = render(row, tokenizer, messages)
        if not 2 <= len(ids) <= max_length:
            raise row.wrong(f"is {len(ids)} tokens long: it needs 2 to {max_length}")
        sequences.append(ids)
    return sequences


def _pair(row: Record, tokenizer: PreTrainedTokenizerBase, stops: Stops) -> Pair:
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


def render(row: Record, tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> list[int]:
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
