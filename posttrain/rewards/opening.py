"""Opens rewards and calls them: one batch at a time, by TRL's convention, whichever kind they are."""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cordee.chat.problems import Note
from cordee.errors import CordeeError, Fault, UserError, nearest
from posttrain.rewards import settings
from posttrain.rewards.answers import Answer
from posttrain.rewards.settings import Reward

VALUE = "reward"
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
Figures = dict[str, float | None]
"""What is measured of an answer: its `reward`, and what else is told of it, such as a judge's `mass`."""
Measure = Callable[[Sequence[Any], Sequence[Any], Mapping[str, Sequence[Any]]], list[Figures]]
"""Measures answers, given prompts, completions, and columns of the rows by name."""


@dataclass
class Opened:
    """A reward that can be called, as TRL calls reward functions."""

    name: str
    weight: float
    measure: Measure
    needs: frozenset[str] = frozenset()
    """Columns without which it can't be called."""
    close: Callable[[], None] = field(default=lambda: None)
    """Frees what it holds."""

    def __post_init__(self) -> None:
        """Take the name by which TRL logs a function."""
        self.__name__ = self.name

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """The rewards of a batch; None where it does not apply to an answer.

        Args:
            prompts: texts or messages of each.
            completions: texts or messages of each.
            completion_ids: token ids of each, where they are known.
            columns: further columns of the rows, a list each; what is no list is handed through.

        Raises:
            UserError: a column is missing.
            Fault: the function does not give a number for each.
        """
        given = dict(columns) if completion_ids is None else {**columns, "completion_ids": completion_ids}
        return [figures[VALUE] for figures in self.measure(prompts, completions, given)]

    def of(self, answers: Sequence[Answer]) -> list[Figures]:
        """What is measured of each answer; columns that a row lacks are None there."""
        names = {name for answer in answers for name in answer.values}
        self._require(names, answers)
        columns = {name: [answer.values.get(name) for answer in answers] for name in names - settings.BATCH}
        return self.measure([answer.prompt for answer in answers], [answer.completion for answer in answers], columns)

    def _require(self, names: set[str], answers: Sequence[Answer]) -> None:
        for name in sorted(self.needs - names):
            hint = nearest(name, names - {"messages", "prompt", "completion"})
            problem = f"the reward {self.name} needs the column {name!r}, which the rows lack"
            raise UserError(problem, file=answers[0].file, key="rewards", hint=hint)


class Rewards:
    """Several rewards that are open together."""

    def __init__(self, opened: Sequence[Opened]) -> None:
        self.functions = list(opened)

    @classmethod
    def open(cls, rewards: Sequence[Reward], note: Note) -> "Rewards":
        """Open all of them; errors as for `open_reward`."""
        return cls([open_reward(reward, note) for reward in rewards])

    def close(self) -> None:
        """Free what they hold."""
        for one in self.functions:
            one.close()


def total(values: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of the rewards that apply to an answer; None where none with a weight does."""
    found = [weights[name] * value for name, value in values.items() if value is not None and weights[name]]
    return sum(found) if found else None


def open_reward(reward: Reward, note: Note) -> Opened:
    """Open a reward.

    Raises:
        UserError: it can't be had: a function that fails on its arguments, a folder that is no model of its kind.
    """
    if reward.model is not None:
        from posttrain.rewards import reward_model

        scorer = reward_model.Scorer.open(reward.model, reward.dtype, reward.max_length, reward.batch_size)
        return Opened(reward.label, reward.weight, scorer.measure)
    if reward.judge is not None:
        from posttrain.rewards import judge

        asked = judge.open_judge(reward, reward.judge, note)
        return Opened(reward.label, reward.weight, asked.measure, close=asked.close)
    return _of_function(reward, str(reward.function))


def _of_function(reward: Reward, named: str) -> Opened:
    module, name = settings.place_of(named)
    arguments = dict(reward.arguments)
    try:
        function = getattr(importlib.import_module(module), name)
        if not settings.BATCH & inspect.signature(function).parameters.keys():
            function, arguments = function(**arguments), {}
        if module == settings.OWN:  # a pattern that is none, a package that is missing
            empty = dict.fromkeys(settings.columns_of(named, arguments), ())
            function(**{**empty, "completions": (), **arguments})
    except UserError as error:
        raise UserError(error.problem, file=error.file, key=f"rewards: {reward.label}", hint=error.hint) from error
    except Exception as error:
        problem = f"{named} can't be used: {type(error).__name__}: {error}"
        raise UserError(problem, file=reward.code, key=f"rewards: {reward.label}") from error
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    known = {one.name for one in parameters}
    needed = {one.name for one in parameters if one.default is one.empty and one.kind in _NAMED}

    def measure(
        prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> list[Figures]:
        given = {**columns, "prompts": prompts, "completions": completions} | arguments
        try:
            found = function(**{key: value for key, value in given.items() if takes_any or key in known})
        except CordeeError:
            raise
        except Exception as error:
            problem = f"{named} raises {type(error).__name__}: {error}"
            raise UserError(problem, file=reward.code, key=f"rewards: {reward.label}") from error
        return [{VALUE: value} for value in checked(found, len(completions), reward.label)]

    return Opened(reward.label, reward.weight, measure, frozenset(needed - {"prompts", "completions"} - {*arguments}))


def checked(values: Any, count: int, name: str) -> list[float | None]:
    """What a reward function has given: a finite number or None for each completion.

    Raises:
        Fault: it is something else.
    """
    try:
        found = [None if value is None else float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise Fault(f"the reward {name} returned a value that is not a number: {error}") from error
    if len(found) != count:
        raise Fault(f"the reward {name} gives {len(found)} values for {count} completions")
    if wrong := [value for value in found if value is not None and not math.isfinite(value)]:
        raise Fault(f"the reward {name} gives {wrong[0]}", hint="None says that it does not apply")
    return found
