"""What a report tells of rewards: the figures of scored answers, of pairs made of them, and of reward models."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from eval.reporting.records import Record, Shape

SCORES, PAIRS, CALIBRATION = "scores.json", "pairs.json", "calibration.json"
Number = Annotated[float, Field(allow_inf_nan=False)]


class RewardFigures(Shape):
    """One reward over all answers."""

    answers: int
    null_share: Number
    mean: Number | None = None
    std: Number | None = None
    least: Number | None = None
    most: Number | None = None
    histogram: list[int] = Field(default_factory=list)
    mass: Number | None = None
    disagreement: Number | None = None


class Mean(Shape):
    """A reward over some of the answers."""

    mean: Number
    answers: int


class OfModel(Shape):
    """A reward of a model's answers, or its divergence from the reference."""

    mean: Number
    error: Number | None = None
    change: Number | None = None
    change_error: Number | None = None


class Scores(Shape):
    """`scores.json`."""

    rewards: dict[str, RewardFigures]
    by: dict[str, dict[str, dict[str, Mean]]] = Field(default_factory=dict)
    models: dict[str, dict[str, OfModel]] = Field(default_factory=dict)
    compared_with: str | None = None
    weights: dict[str, Number] = Field(default_factory=dict)
    answers: int
    prompts: int

    def told(self) -> dict[str, Any]:
        """What the page shows: the model compared with first; no weighted sum where it is the one reward there is."""
        names = [name for name in self.rewards if name != "sum" or list(self.weights.values()) != [1.0]]
        models = sorted(self.models.items(), key=lambda item: item[0] != self.compared_with)
        shown = self.model_copy(
            update={"rewards": {name: self.rewards[name] for name in names}, "models": dict(models)}
        )
        return shown.model_dump()


class Pairs(Shape):
    """`pairs.json`."""

    choose: str
    pairs: int
    prompts: int
    answers: int
    margin_mean: Number
    without: dict[str, int] = Field(default_factory=dict)


class Bin(Shape):
    """Pairs about which a reward model is about as sure."""

    pairs: int
    confidence: Number
    accuracy: Number


class Calibration(Shape):
    """`calibration.json`."""

    pairs: int
    accuracy: Number
    expected_calibration_error: Number
    bins: list[Bin]


def collect(records: list[Record]) -> dict[str, list[dict[str, Any]]]:
    """The figures of `scores`, `pairs` and `reward_models`, each with its artifact and stage."""

    def of(file: str, told: Callable[[Record], dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"artifact": record.name, "stage": record.manifest.stage, **told(record)}
            for record in records
            if record.holds(file)
        ]

    return {
        "scores": of(SCORES, lambda record: record.read(SCORES, Scores).told()),
        "pairs": of(PAIRS, lambda record: record.read(PAIRS, Pairs).model_dump()),
        "reward_models": of(CALIBRATION, lambda record: record.read(CALIBRATION, Calibration).model_dump()),
    }
