"""What the beginning of a data file shows: the shape of its rows and their lengths, without torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cordee import files, model_folder
from cordee.chat import formats, overhead
from cordee.chat.source import Source
from cordee.config import Input
from cordee.data.folder import find_files
from cordee.data.rows import batches, estimate
from cordee.errors import UserError

ROLES = ("role", "from")
"""Keys of a message whose words a chat template writes itself."""
ROWS = 1000
"""How many rows are looked at."""
RENAMED = tuple({asked: "prompt", answer: "completion"} for asked, answer in (
    ("question", "answer"), ("question", "response"), ("query", "response"), ("instruction", "response"),
    ("input", "output"),
))  # fmt: skip
"""Columns that many data sets have, under the names that training knows."""


@dataclass
class Data:
    """What the beginning of a data file shows."""

    rows: int
    """About how many there are."""
    shape: str
    """As `cordee data` names it."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns to rename."""
    words: int = 0
    """Distinct words in the rows that were looked at."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each row that was looked at, in order of size."""

    def percentile(self, share: float) -> int:
        """The length, in tokens, that this share of the rows do not exceed."""
        return self.lengths[min(len(self.lengths) - 1, int(share * len(self.lengths)))] if self.lengths else 0


def look(path: Path, model: Path | None, key: str) -> Data:
    """Look at the beginning of a data file.

    Raises:
        UserError: it can't be read, or its rows have no shape that is known.
    """
    found = find_files(path, key=key).documents
    rows = list(islice((row for batch in batches(found, key=key) for row in batch), ROWS))
    whole = [row.values for row in rows if isinstance(row.values, dict)]
    if not whole:
        raise UserError("holds no row that can be read", file=path, key=key)
    columns = next((names for names in RENAMED if not formats.shape(whole[0]) and names.keys() <= whole[0].keys()), {})
    source = Source(path=Input(path), columns=columns)
    told = formats.columns_of(next(row for row in rows if isinstance(row.values, dict)), source)
    shape = formats.shape(told)
    if not shape:
        names = ", ".join(map(repr, told))
        hint = "rename them to `messages`, or to `prompt` and `completion`; a recipe does it by `columns:`"
        raise UserError(f"can't be told what it is: its columns are {names}", file=path, key=key, hint=hint)
    count = len(rows) if len(rows) < ROWS else int(estimate(found, key)[0])
    words = {word for row in whole for text in _texts(row) for word in text.split()}
    return Data(count, shape, columns, len(words), _lengths(whole, model, shape))


def _lengths(rows: list[dict[str, Any]], model: Path | None, shape: str) -> list[int]:
    """About the tokens of each row with what the chat template adds, in order of size; without a model, by bytes."""
    texts = ["\n".join(_texts(row)) for row in rows]
    folder = model_folder.tokenizer_of(model) if model else None
    if folder is None or not (folder / "tokenizer.json").is_file():
        return sorted(len(text.encode()) // 4 for text in texts)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    each_chat, each_message = (0, 0) if shape == "text" else _overhead(folder, tokenizer)
    found = zip(tokenizer.encode_batch_fast(texts), rows, strict=True)
    return sorted(len(one.ids) + each_chat + each_message * _messages(row) for one, row in found)


def _overhead(folder: Path, tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens that a folder's chat template, or the one that it is given, adds to a chat and to a message."""
    told = files.read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    text = model_folder.chat_template(folder)
    tokens = {name: (one.get("content") if isinstance(one, dict) else one) for name, one in told.items() if one}
    variables = {name: tokens[name] for name in ("bos_token", "eos_token") if name in tokens}
    if text is None:
        return overhead.UNKNOWN
    return overhead.of(text, variables, lambda one: len(tokenizer.encode(one, add_special_tokens=False).ids))


def _messages(row: dict[str, Any]) -> int:
    """The messages of a row; two where it has none, as in prompt and completion."""
    found = max((len(value) for value in row.values() if _are_messages(value)), default=2)
    return max(found, 2)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        items = [item for key, item in value.items() if key not in ROLES] if isinstance(value, dict) else value
        for item in items:
            yield from _texts(item)
