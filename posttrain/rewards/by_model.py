"""What each model's answers are worth, with standard errors over prompts, and its divergence from the reference."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.rewards.opening import VALUE

SUM, KL = "sum", "kl"
"""The names of the weighted sum of rewards, and of the divergence from the reference, nats."""


class ByModel:
    """Figures of answers by the model that gave them; memory holds a number for each prompt, model and figure.

    The mean of `log_ratio` over a model's own answers, drawn at temperature 1, estimates KL(model ‖ reference) of a
    whole answer (Schulman 2020, "Approximating KL divergence": the estimator k1). Answers that are not as they were
    sampled have none.
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
            figures[KL] = row.get("log_ratio")
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


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error; None where there is one value only."""
    mean, count = math.fsum(values) / len(values), len(values)
    if count < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
