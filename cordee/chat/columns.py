"""The Arrow columns that sequences are kept in."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cordee.chat.answers import TokenAnswer
from cordee.chat.conversations import Conversation
from cordee.chat.pairs import TokenPair
from cordee.chat.prompts import Prompt
from cordee.chat.source import Of

TEXT = "row"
"""The list that holds a row as JSON, in bytes."""
TOKENS: dict[Of, tuple[str, ...]] = {
    "chats": ("ids",),
    "pairs": ("prompt", "chosen", "rejected"),
    "labelled": ("prompt", "completion"),
    "scored": ("prompt", "completion"),
    "prompts": ("ids",),
}
"""Lists of token ids."""
LISTS: dict[Of, dict[str, Any]] = {
    **{of: dict.fromkeys(names, pa.int32()) for of, names in TOKENS.items()},
    "chats": dict.fromkeys(("ids", "loss", "answers"), pa.int32()),
    "scored": {"prompt": pa.int32(), "completion": pa.int32(), "reference_rewards": pa.float64()},
    "prompts": {"ids": pa.int32(), TEXT: pa.uint8()},
}
"""All lists, and the type of their items."""
NUMBERS: dict[Of, dict[str, Any]] = {
    "chats": {"messages": pa.int32(), "is_cut": pa.int8()},
    "pairs": dict.fromkeys(("chosen_reference_logprob", "rejected_reference_logprob"), pa.float64()),
    "labelled": dict.fromkeys(("label", "reference_logprob"), pa.float64()),
    "scored": dict.fromkeys(("reward", "reference_logprob"), pa.float64()),
    "prompts": {},
}
"""Numbers beside the file's place and the row's number; NaN where one is not told."""
HASHED: dict[Of, tuple[str, ...]] = {**TOKENS, "prompts": ("ids", TEXT)}
"""Lists of which a hash is kept: two rows of which they are the same are one row twice."""


def hashes(of: Of) -> tuple[str, ...]:
    """The columns of the hashes of `HASHED`."""
    return tuple(f"{name}_hash" for name in HASHED[of])


def schema(of: Of) -> pa.Schema:
    """The columns of sequences."""
    return pa.schema(
        [
            ("file", pa.int32()),
            ("number", pa.int64()),
            *NUMBERS[of].items(),
            *((name, pa.large_list(kind)) for name, kind in LISTS[of].items()),
            *((name, pa.int64()) for name in hashes(of)),
        ]
    )


def record_batch(
    of: Of, found: Sequence[Conversation | TokenPair | TokenAnswer | Prompt], places: Mapping[Path, int]
) -> pa.RecordBatch:
    """Sequences as a batch.

    Args:
        of: what they are of.
        found: the sequences.
        places: the place of each file among those of the source.
    """
    arrays: list[Any] = []
    names = schema(of).names
    for field in schema(of):
        make, list_of = MADE.get(field.name), field.name.removesuffix("_hash")
        if list_of != field.name:
            arrays.append(pa.array(_hashes(arrays[names.index(list_of)])))
            continue
        if field.name == "file":
            values: list[Any] = [places[one.file] for one in found]
        else:
            values = [make(one) if make else getattr(one, field.name) for one in found]
        if pa.types.is_large_list(field.type):
            kind = field.type.value_type
            offsets = pa.array(np.cumsum([0, *map(len, values)]), pa.int64())
            items = [np.asarray(value, kind.to_pandas_dtype()) for value in ([], *values)]
            arrays.append(pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(items), kind)))
        else:
            arrays.append(pa.array(np.asarray(values, field.type.to_pandas_dtype()), field.type))
    return pa.record_batch(arrays, schema=schema(of))


def numbers(batches: Sequence[pa.RecordBatch]) -> dict[str, npt.NDArray[Any]]:
    """`[sequences]` each: all columns that are no lists."""
    names = [field.name for field in batches[0].schema if not pa.types.is_large_list(field.type)]
    return {name: np.concatenate([batch.column(name).to_numpy() for batch in batches]) for name in names}


def _hashes(column: Any) -> npt.NDArray[np.int64]:
    """`[lists]`: hashes of the items of each list, the same in every process."""
    ends = (column.offsets.to_numpy() * (column.type.value_type.bit_width // 8)).tolist()
    items = column.values.to_numpy().view(np.uint8).data
    found = [hashlib.blake2b(items[first:until], digest_size=8).digest() for first, until in pairwise(ends)]
    return np.frombuffer(b"".join(found), np.int64)


def _loss(one: Conversation) -> Any:
    """Where runs of tokens with loss begin and end, in turn."""
    return np.flatnonzero(np.diff(np.concatenate(([False], one.has_loss, [False]))))


def _answers(one: Conversation) -> Any:
    """Of each answer its message and its places, one after the other."""
    return np.array([(a.message, a.first, a.end, a.until) for a in one.answers], np.int32).reshape(-1)


def _text(one: Prompt) -> Any:
    """The row as JSON, in bytes."""
    return np.frombuffer(json.dumps(one.row).encode(), np.uint8)


MADE: dict[str, Any] = {"loss": _loss, "answers": _answers, TEXT: _text}
"""Lists that are no attributes as they stand."""


def counts(of: Of, batch: pa.RecordBatch) -> dict[str, int]:
    """What a batch's sequences add to the report."""
    sizes = {name: len(batch.column(name).values) for name in TOKENS[of]}
    if of == "chats":
        runs = batch.column("loss").values.to_numpy().astype(np.int64)
        with_loss = int((runs[1::2] - runs[::2]).sum())
        return {"sequences": batch.num_rows, "tokens": sizes["ids"], "loss_tokens": with_loss}
    if of == "prompts":
        return {"sequences": batch.num_rows, "tokens": sizes["ids"]}
    if of == "pairs":
        return {"sequences": batch.num_rows, "tokens": 2 * sizes["prompt"] + sizes["chosen"] + sizes["rejected"]}
    return {"sequences": batch.num_rows, "tokens": sizes["prompt"] + sizes["completion"]}
