"""How often each row stands in the mixture: caps, weights, and a number of rows or tokens in all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cordee.errors import UserError
from posttrain.mixing.settings import TooFew

Copies = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Supply:
    """What a source has to give."""

    name: str
    tokens: npt.NDArray[np.int64]
    """`[rows]`: tokens of each; zeros where they were not counted."""
    kept: npt.NDArray[np.bool_]
    """`[rows]`: whether a row may be taken."""
    weight: float
    max_rows: int | None = None
    max_tokens: int | None = None


def copies(
    supplies: Sequence[Supply], rows: int | None, tokens: int | None, too_few: TooFew, seed: int
) -> list[Copies]:
    """`[rows]` for each source: how often each of its rows stands in the mixture.

    Without `rows` and `tokens`, a source's rows stand there `weight` times: whole copies, and a random share for the
    rest. With them, each source gives its part of the total: whole copies of its rows as long as they are needed, then
    some that the seed draws. Of tokens, the last row is the one with which the part is reached.

    Raises:
        UserError: a source has too few rows for its part, and that is not allowed.
    """
    orders = [_order(supply, seed, at) for at, supply in enumerate(supplies)]
    found = [np.zeros(len(supply.kept), np.int64) for supply in supplies]
    total = rows if rows is not None else tokens
    if total is None:
        for supply, order, count in zip(supplies, orders, found, strict=True):
            whole, rest = divmod(supply.weight, 1.0)
            count[order] = int(whole)
            count[order[: round(rest * len(order))]] += 1
        return found
    unit = "rows" if rows is not None else "tokens"
    parts = _parts(total, [supply.weight for supply in supplies])
    for supply, order, count, part in zip(supplies, orders, found, parts, strict=True):
        sizes = np.ones(len(order), np.int64) if unit == "rows" else supply.tokens[order]
        _take(count, order, sizes, part, too_few, f"{supply.name} has {int(sizes.sum())} {unit}")
    return found


def _order(supply: Supply, seed: int, at: int) -> Copies:
    """The places of the rows of a source that its caps leave, in the order in which they are drawn."""
    (rows,) = np.nonzero(supply.kept)
    order = rows[np.random.default_rng((seed, at)).permutation(len(rows))][: supply.max_rows]
    if supply.max_tokens is not None:
        order = order[np.cumsum(supply.tokens[order]) <= supply.max_tokens]
    return order


def _parts(total: int, weights: Sequence[float]) -> list[int]:
    """A total divided by weights into whole numbers: those with the largest remainders are rounded up."""
    exact = total * np.array(weights) / sum(weights)
    found = np.floor(exact).astype(np.int64)
    for at in np.argsort(found - exact, kind="stable")[: total - int(found.sum())]:
        found[at] += 1
    return [int(part) for part in found]


def _take(count: Copies, order: Copies, sizes: Copies, part: int, too_few: TooFew, told: str) -> None:
    """Count a source's rows up to its part of the total."""
    available = int(sizes.sum())
    if part > available and (too_few == "error" or (too_few == "repeat" and not available)):
        hint = "lower the total or its weight; or `too_few: repeat` takes rows again, `accept` what there is"
        raise UserError(f"{told}; its share is {part}", key="data", hint=hint)
    if not available:
        return
    whole, rest = divmod(part if too_few == "repeat" else min(part, available), available)
    count[order] = whole
    if rest:
        count[order[: int(np.searchsorted(np.cumsum(sizes), rest)) + 1]] += 1
