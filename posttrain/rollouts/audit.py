"""What is trained on is what was sampled: the trainer's own batches are compared with the prompts and the completions.

Each row of a batch has to be a prompt as `cordee.chat` renders it, and behind it the tokens that were sampled, of which
all carry loss and no other token does.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from cordee.errors import Fault

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""The ids of a prompt, and those that carry loss behind it."""


def rows(batch: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of a batch `[rows, length]` as the trainer's loss reads it."""
    asked, said = batch["prompt_mask"].bool().cpu(), batch["completion_mask"].bool().cpu()
    if batch.get("tool_mask") is not None:
        said = said & batch["tool_mask"].bool().cpu()
    prompts, completions = batch["prompt_ids"].cpu(), batch["completion_ids"].cpu()
    for row in range(len(prompts)):
        yield tuple(prompts[row][asked[row]].tolist()), tuple(completions[row][said[row]].tolist())


def expected(
    prompts: Sequence[Sequence[int]], sampled: Sequence[Sequence[int]], is_masked: Sequence[bool]
) -> Counter[Row]:
    """What batches have to hold; a completion that is masked carries no loss."""
    found: Counter[Row] = Counter()
    for prompt, ids, masked in zip(prompts, sampled, is_masked, strict=True):
        found[tuple(prompt), () if masked else tuple(ids)] += 1
    return found


def require(batch: Mapping[str, Any], known: Counter[Row]) -> None:
    """See that a batch's rows are among those that are known.

    Raises:
        Fault: one is another.
    """
    for prompt, said in rows(batch):
        if (prompt, said) in known:
            continue
        same = [ids for asked, ids in known if asked == prompt]
        if not same:
            raise Fault(f"the trainer's batch holds a prompt of {len(prompt)} tokens that is not in the data")
        nearest = max(same, key=lambda ids: sum(a == b for a, b in zip(ids, said, strict=False)))
        raise Fault(
            f"the trainer's batch holds a completion that was not sampled: {len(said)} tokens carry loss, and of the "
            f"most similar one {len(nearest)} were sampled"
        )


def truncated(completions: Sequence[Sequence[int]], ends: Sequence[int]) -> list[bool]:
    """Of each completion, whether it ends without an end token."""
    return [ids[-1] not in ends for ids in completions]


def sampled_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """`[rows, length]`: 1 where a token of a completion carries loss."""
    mask: torch.Tensor = batch["completion_mask"]
    return mask if batch.get("tool_mask") is None else mask * batch["tool_mask"]
