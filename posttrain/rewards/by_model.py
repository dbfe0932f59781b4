"""What each model's answers are worth, with standard errors over prompts, and its divergence from the reference."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.rewards.opening import VALUE

SUM, KL = "sum", "kl"
"""The names of the weighted sum of rewards, and of an answer's log-probability less that under the reference, nats."""


class ByModel:
    """Figures of answers by the model that gave them; memory holds a number for each prompt, model and figure.

    The mean of `kl` over a model's own answers, drawn at temperature 1, estimates KL(model ‖ reference) of a whole
    answer (Schulman 2020, "Approximating KL divergence": the estimator k1). Left out are answers that were cut off, and
    those whose text has other tokens than were sampled: the log-probabilities are not of what the model drew.
    """

    def __init__(self, compared_with: str | None) -> None:
        """Figures, and their differences from those of the model `compared_with`."""
        self._compared_with = compared_with
        self._means: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        """By model, by figure, by prompt: the mean over the model's answers."""

    def add(self, prompt: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count the scored answers to a prompt."""
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        for row in rows:
            if row.get("model") is None:
                continue
            figures = {**row.get("rewards", {}), SUM: row.get(VALUE)}
            own, reference = row.get("policy_logprob"), row.get("reference_logprob")
            if own is not None and reference is not None and is_as_sampled(row):
                figures[KL] = own - reference
            for name, value in figures.items():
                if value is not None:
                    found[str(row["model"]), name].append(float(value))
        for (model, name), values in found.items():
            self._means[model][name][prompt] = math.fsum(values) / len(values)

    def described(self) -> dict[str, Any]:
        """By model, by figure: `mean`, its `error`, and the `change` against the model compared with, and its `error`.

        A change is over the prompts that both have answered, prompt by prompt.
        """
        first = self._means.get(self._compared_with or "", {})
        found: dict[str, Any] = {}
        for model, figures in self._means.items():
            found[model] = {}
            for name, values in figures.items():
                mean, error = _mean(list(values.values()))
                entry = {"mean": mean, "error": error, "prompts": len(values)}
                shared = values.keys() & first.get(name, {}).keys()
                if model != self._compared_with and shared:
                    entry["change"], entry["change_error"] = _mean([values[at] - first[name][at] for at in shared])
                found[model][name] = entry
        return found


def is_as_sampled(row: Mapping[str, Any]) -> bool:
    """Whether the answer ended by itself and its text has as many tokens as were sampled; true if a row doesn't say."""
    sampled, scored = row.get("tokens"), row.get("reference_tokens")
    return row.get("finish_reason") != "length" and (sampled is None or scored is None or sampled == scored)


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error; None where there is one value only."""
    mean, count = math.fsum(values) / len(values), len(values)
    if count < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
