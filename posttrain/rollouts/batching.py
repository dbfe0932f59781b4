"""Micro-batches with little padding: the completions of an optimizer step sorted by length, each batch cut to its own.

TRL pads every micro-batch to the longest prompt and the longest completion of all that was sampled at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

Batch = dict[str, Any]


def regrouped(batches: Sequence[Mapping[str, Any]], window: int, *, sorts: bool) -> list[Batch]:
    """The micro-batches that TRL made of a rollout, with the same rows in each optimizer step.

    Args:
        batches: tensors by name, `[rows, length]` or `[rows]`, or a scalar of all rows.
        window: micro-batches of an optimizer step.
        sorts: whether rows are sorted by length; not where a loss is a mean over one micro-batch.
    """
    found: list[Batch] = []
    for start in range(0, len(batches), window):
        some = batches[start : start + window]
        if sorts and len(some) > 1:
            whole = {name: _joined([batch[name] for batch in some]) for name in some[0]}
            order = (whole["prompt_mask"].sum(-1) + whole["completion_mask"].sum(-1)).argsort(
                descending=True, stable=True
            )
            size = len(order) // len(some)
            some = [_rows(whole, order[at * size : (at + 1) * size]) for at in range(len(some))]
        found += [cut(batch) for batch in some]
    return found


def cut(batch: Mapping[str, Any]) -> Batch:
    """A batch without the columns that are padding in all of its rows; at least one of a completion is kept.

    Returns:
        The same names: `[rows, prompt]` where they begin with `prompt_`, other tensors of two dimensions
        `[rows, completion]`, both as short as the rows allow; anything else as it is.
    """
    asked, said = batch["prompt_mask"].bool().any(0), batch["completion_mask"].bool().any(0)
    first = int(asked.int().argmax())
    until = max(1, int(said.nonzero().max()) + 1 if said.any() else 1)
    found: Batch = {}
    for name, value in batch.items():
        is_wide = torch.is_tensor(value) and value.ndim == 2
        found[name] = value if not is_wide else value[:, first:] if name.startswith("prompt_") else value[:, :until]
    return found


def _joined(values: Sequence[Any]) -> Any:
    return torch.cat(list(values)) if torch.is_tensor(values[0]) and values[0].ndim else values[0]


def _rows(batch: Mapping[str, Any], rows: torch.Tensor) -> Batch:
    return {
        name: value[rows] if torch.is_tensor(value) and value.ndim else value for name, value in batch.items()
    }  # fmt: skip
