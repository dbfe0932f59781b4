"""Prompts in tokens: a chat up to where its answer begins, or a text to continue, with the row's other columns."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cordee.chat import formats, schema, texts
from cordee.chat.conversations import Encoder, Ids
from cordee.chat.problems import BadRowError, Notes, OverlongRowError, Problems
from cordee.chat.schema import Record
from cordee.chat.values import without_nulls
from cordee.data.row import Row

CHAT = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output")
"""Columns that are asked, or that hold an answer to what is; all others are carried along."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked."""

    file: Path
    number: int
    """Its row in the file, from 1."""
    ids: Ids
    """`[seq]`, int32."""
    row: dict[str, Any]
    """`prompt`, as messages or as a text, and the row's other columns; `answer` where one stands beside the prompt."""


def encode(rows: Sequence[Row], encoder: Encoder, problems: Problems, notes: Notes) -> list[Prompt]:
    """Prompts in tokens; of a row with a problem, none."""
    found: list[Prompt] = []
    for row in rows:
        with problems.of(row.file, row.number, row.values):
            values = formats.columns_of(row, encoder.source)
            if encoder.as_text and isinstance(values.get("prompt"), str):
                asked, ids = values["prompt"], texts.ids_of(values["prompt"], encoder.tokenizer)
                answer = values.get("answer")
                notes.texts += 1
            else:
                shaped, answer = formats.question(values)
                template = encoder.required_template()
                chat = schema.asked(Record(row.file, row.number, shaped), template, encoder.source.ignore)
                asked = without_nulls(shaped["messages"])
                text = template.text(chat.messages, chat.options, add_generation_prompt=True)
                (ids,) = template.encode([text])["input_ids"]
            _require_fits(ids, encoder)
            columns = {name: value for name, value in values.items() if name not in CHAT}
            if answer is not None:
                columns.setdefault("answer", answer)
            plain = json.loads(json.dumps({**columns, "prompt": asked}, default=str))
            found.append(Prompt(row.file, row.number, np.array(ids, np.int32), plain))
    return found


def _require_fits(ids: Sequence[int], encoder: Encoder) -> None:
    """See that a prompt is none that is too long.

    Raises:
        BadRowError: it is, or it is empty, or holds an id beyond the model's embedding.
    """
    if not ids:
        raise BadRowError("asks nothing", "prompt")
    limits = encoder.rules.limits
    limits.check_ids(ids)
    if limits.longest is not None and len(ids) > limits.longest:
        hint = "`overlong: drop` leaves such prompts out"
        raise OverlongRowError(f"a prompt of more than {limits.longest} tokens", f"{len(ids)} tokens", hint)
