"""Held-out prompts: reading them, encoding them through the chat template, and answering them with transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from cordee import model_folder
from cordee.chat.formats import columns_of, question
from cordee.chat.problems import BadRowError, Note
from cordee.chat.source import Source
from cordee.chat.spelling import Message, joined
from cordee.chat.templates import Template
from cordee.chat.values import texts_in
from cordee.compute.adapter import stop_token_ids
from cordee.compute.tokenizer import open_tokenizer
from cordee.config import Input
from cordee.data.folder import find_files
from cordee.data.rows import batches
from cordee.errors import UserError


def read(path: Path, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of a data file: `messages` to be answered, the last of them as `prompt`, and `answer` if there is one.

    Raises:
        UserError: it is none, a row asks nothing or has an answer that is no text, or there is no row.
    """
    if path.is_dir():
        raise UserError("is a folder: name one of its files", file=path, key="prompts")
    source = Source(path=Input(path), columns=dict(columns))
    found = []
    for row in (row for batch in batches(find_files(path, key="prompts").documents) for row in batch):
        try:
            values = columns_of(row, source)
            messages, answer = question(values)
        except BadRowError as error:
            raise UserError(f"{row.place}: {error.problem}", file=row.file, key="prompts", hint=error.hint) from error
        asked = messages[-1].get("content") if messages and isinstance(messages[-1], dict) else None
        if not isinstance(asked, str) or not asked:
            raise UserError(f"{row.place} asks nothing as a text", file=row.file, key="prompts")
        if not isinstance(answer, str | int | float | None):
            hint = "`columns: {answer: other}` leaves it out"
            raise UserError(f"the answer in {row.place} is no text", file=row.file, key="prompts", hint=hint)
        told: dict[str, Any] = {name: values[name] for name in ("kind", "language") if name in values}
        said = {} if answer is None else {"answer": str(answer)}
        found.append({**told, "messages": messages, "prompt": asked, **said})
    if not found:
        raise UserError("holds no prompt", file=path, key="prompts")
    return found


def spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` rows spread evenly over the languages, in the order of the file; all of them if there are fewer.

    Round by round, each language gives one row more; a round that is not needed in full is thinned evenly. The
    languages begin at different rows, so that not all give the same passage.
    """
    by_language: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        by_language.setdefault(row.get("language") or "", []).append(at)
    turned = [[own[(turn + at) % len(own)] for at in range(len(own))] for turn, own in enumerate(by_language.values())]
    chosen: list[int] = []
    for turn in range(max(map(len, turned))):
        coming = [own[turn] for own in turned if turn < len(own)]
        needed = min(count - len(chosen), len(coming))
        chosen += [coming[at * len(coming) // needed] for at in range(needed)]
    return [rows[at] for at in sorted(chosen)]


def encode(folder: Path, chats: Sequence[list[Message]], longest: int, path: Path, note: Note) -> list[list[int]]:
    """The token ids `[seq]` of each chat, up to where the assistant's turn begins; of a base model, of its texts.

    Raises:
        UserError: one is longer than `longest` tokens, spells out a special token, or is refused by the template.
    """
    tokenizer = open_tokenizer(model_folder.tokenizer_of(folder), key="models")
    if tokenizer.chat_template:
        encoded = _rendered(Template(tokenizer), chats, path)
    else:
        note(f"{folder.name} has no chat template: it continues each prompt as it stands")
        texts = ["\n\n".join(joined(message["content"]) for message in chat) for chat in chats]
        encoded = tokenizer(texts)["input_ids"]
    for number, ids in enumerate(encoded, start=1):
        if len(ids) > longest:
            raise UserError(
                f"prompt {number} has {len(ids)} tokens, and {longest} fit in {folder}", file=path, key="max_length"
            )
    return encoded


def _rendered(template: Template, chats: Sequence[list[Message]], path: Path) -> list[list[int]]:
    """The token ids `[seq]` of each chat by a template.

    Raises:
        UserError: one spells out a special token, or is refused by the template.
    """
    asked = []
    for number, chat in enumerate(chats, start=1):
        try:
            template.require_plain(texts_in(chat))
            messages = template.readable(chat, {})
            template.require_written(messages, {})
            asked.append(template.text(messages, {}, add_generation_prompt=True))
        except BadRowError as error:
            raise UserError(f"prompt {number}: {error.problem}", file=path, key="prompts") from error
    encoded: list[list[int]] = template.encode(asked)["input_ids"]
    return encoded


def generate(
    model: PreTrainedModel, folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float,
    seed: int, batch_size: int,
) -> list[str]:  # fmt: skip
    """Continue prompts of token ids with a folder's model; greedy at temperature 0, else each by its own seed."""
    at_once = batch_size if temperature == 0 else 1  # a sample must not depend on what is drawn beside it
    tokenizer, stops = open_tokenizer(model_folder.tokenizer_of(folder)), stop_token_ids(folder)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Nothing of the model's own generation config, such as a repetition penalty: vLLM is given none of it either.
    model.generation_config = GenerationConfig()
    sampled = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    chosen: dict[str, Any] = {"do_sample": temperature > 0, **sampled}
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
                eos_token_id=stops, pad_token_id=pad, **chosen,
            )  # fmt: skip
        texts += tokenizer.batch_decode(
            output[:, longest:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    return texts
