"""Changes between two checkpoints on the same documents, with standard errors and what they are worth.

A *ratio mean* is sum(values) / sum(weights): with weights of 1 the plain mean (accuracy), with bytes as weights
and bits as values the bits per byte of a whole text. A change is *paired* where both checkpoints were scored on
the same documents: the documents' own difficulty then cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BITS_PER_BYTE = "bits_per_byte"
Z_95 = 1.959963984540054
"""The 97.5% quantile of the normal distribution: ± this many standard errors hold 95%."""


@dataclass(frozen=True)
class Change:
    """A difference, after minus before."""

    value: float
    standard_error: float | None
    """None where it can't be known: fewer than two documents, or a benchmark that gives no error."""
    paired: bool
    rows: int | None
    """Documents that the pair shares; None if unpaired."""

    @property
    def p_value(self) -> float | None:
        """Two-sided, by the normal distribution, against no change."""
        if self.standard_error is None:
            return None
        if self.standard_error == 0.0:
            return 1.0 if self.value == 0.0 else 0.0
        return math.erfc(abs(self.value) / self.standard_error / math.sqrt(2.0))


def score(metric: str, value: Any) -> tuple[float, float]:
    """A document's value and weight: lm-eval keeps [log-likelihood in nats, bytes] for bits per byte."""
    if metric == BITS_PER_BYTE:
        log_likelihood, size = value
        return -float(log_likelihood) / math.log(2), float(size)
    return float(value), 1.0


def document_bits(document: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """lm-eval's `process_results` for a task whose continuation is a document's `text`: log-likelihood and bytes."""
    return _bits(document["text"], results)


def answer_bits(document: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """The same for a task whose continuation is a document's `answer`."""
    return _bits(document["answer"], results)


def _bits(text: str, results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    ((log_likelihood, _is_greedy),) = results
    return {BITS_PER_BYTE: (log_likelihood, len(text.encode()))}


def ratio_mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """sum(values) / sum(weights) and its standard error over rows.

    The error is the linearized one of a ratio (Cochran 1977, Sampling Techniques, equation 6.13, without the
    finite population): sqrt(n / (n - 1) · sum((value - ratio · weight)²)) / sum(weights). With weights of 1
    that is the sample deviation over sqrt(n).

    Raises:
        ValueError: no rows, or as many values as weights there are not.
    """
    if not values or len(values) != len(weights):
        raise ValueError(f"{len(values)} values with {len(weights)} weights")
    whole, count = math.fsum(weights), len(values)
    ratio = math.fsum(values) / whole
    if count < 2:
        return ratio, None
    squares = math.fsum((value - ratio * weight) ** 2 for value, weight in zip(values, weights, strict=True))
    return ratio, math.sqrt(count / (count - 1) * squares) / whole


def paired_change(before: Sequence[float], after: Sequence[float], weights: Sequence[float]) -> Change:
    """The change of a ratio mean over the same rows, from each row's own difference."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    value, error = ratio_mean(differences, weights)
    return Change(value, error, paired=True, rows=len(differences))


def unpaired_change(before: float, before_error: float | None, after: float, after_error: float | None) -> Change:
    """The change between two values of which only the standard errors are known: the errors' squares add up."""
    known = before_error is not None and after_error is not None
    error = math.hypot(before_error or 0.0, after_error or 0.0) if known else None
    return Change(after - before, error, paired=False, rows=None)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are (Holm 1979): calling those below 5% real errs in at most 5% of reports.

    In order of size the k-th smallest of m is multiplied by m - k + 1, and none may fall below the one before it.
    """
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = floor
    return adjusted


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of the `window` values round each (fewer at the ends); an odd window is centred."""
    half = window // 2
    slices = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [math.fsum(part) / len(part) for part in slices]
