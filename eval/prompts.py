"""Held-out prompts: reading them, encoding them through the chat template, and answering them with transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from cordee import files
from cordee.chat.formats import BadRowError
from cordee.chat.templates import Template
from cordee.compute.model import stop_token_ids
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import UserError


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file with `prompt` and `answer`.

    Raises:
        UserError: a line is no such row, or there is none.
    """
    rows = files.read_rows(path)
    for number, row in enumerate(rows, start=1):
        for name in ("prompt", "answer"):
            if not isinstance(row.get(name), str) or not row[name]:
                raise UserError(f"row {number} has no {name!r}", file=path, key="prompts")
    if not rows:
        raise UserError("holds no prompt", file=path, key="prompts")
    return rows


def spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` rows spread evenly over the languages, in the order of the file; all of them if there are fewer.

    Round by round, each language gives one row more; a round that is not needed in full is thinned evenly. The
    languages begin at different rows, so that not all give the same passage.
    """
    by_language: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        by_language.setdefault(row.get("language", ""), []).append(at)
    turned = [[own[(turn + at) % len(own)] for at in range(len(own))] for turn, own in enumerate(by_language.values())]
    chosen: list[int] = []
    for turn in range(max(map(len, turned))):
        coming = [own[turn] for own in turned if turn < len(own)]
        needed = min(count - len(chosen), len(coming))
        chosen += [coming[at * len(coming) // needed] for at in range(needed)]
    return [rows[at] for at in sorted(chosen)]


def encode(folder: Path, prompts: Sequence[str], longest: int, path: Path) -> list[list[int]]:
    """The token ids of each prompt as one user's turn, up to where the assistant's turn begins.

    Raises:
        UserError: one is longer than `longest` tokens, spells out a special token, or is refused by the template.
    """
    template = Template(open_tokenizer(folder, key="models"))
    asked = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            template.require_plain([prompt])
            asked.append(template.text([{"role": "user", "content": prompt}], {}, add_generation_prompt=True))
        except BadRowError as error:
            raise UserError(f"prompt {number}: {error.problem}", file=path, key="prompts") from error
    encoded: list[list[int]] = template.encode(asked)["input_ids"]
    for number, ids in enumerate(encoded, start=1):
        if len(ids) > longest:
            raise UserError(f"prompt {number} has {len(ids)} tokens, and {longest} fit", file=path, key="max_length")
    return encoded


def generate(
    model: PreTrainedModel, folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float,
    seed: int, batch_size: int,
) -> list[str]:  # fmt: skip
    """Continue prompts of token ids with a folder's model; greedy at temperature 0, else each by its own seed."""
    at_once = batch_size if temperature == 0 else 1  # a sample must not depend on what is drawn beside it
    tokenizer = open_tokenizer(folder)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    chosen: dict[str, Any] = {"do_sample": temperature > 0, **({"temperature": temperature} if temperature > 0 else {})}
    texts = []
    for start in range(0, len(prompts), at_once):
        transformers.set_seed(seed + start)
        batch = [list(ids) for ids in prompts[start : start + at_once]]
        longest = max(map(len, batch))
        padded = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in batch])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch])
        with torch.no_grad():
            output = model.generate(
                input_ids=padded.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_tokens,
                eos_token_id=stop_token_ids(folder), pad_token_id=pad, **chosen,
            )  # fmt: skip
        texts += tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return texts
