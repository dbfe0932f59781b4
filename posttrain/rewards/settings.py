"""The rewards of a recipe: plain functions that are called as TRL calls them.

    f(prompts, completions, completion_ids, **columns) -> list[float | None]

`prompts` and `completions` are messages, or texts where the model has no chat template; each column of the data comes
as a list. None says that a reward does not apply.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from cordee.config import Config
from cordee.errors import CordeeError, UserError, nearest

Function = Callable[..., list[float | None]]


class Reward(Config):
    """One reward."""

    function: str
    """`package.module:function`."""
    name: str | None = None
    """What it is called in metrics and completions; by default as the function."""
    weight: float = 1.0
    """What it is multiplied by in the sum of all rewards."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the function."""

    @property
    def called(self) -> str:
        """Its name."""
        return self.name or self.function.rpartition(":")[2]


@dataclass(frozen=True)
class Opened:
    """A reward that can be called."""

    name: str
    weight: float
    function: Function


def open_rewards(rewards: Sequence[Reward]) -> list[Opened]:
    """Import the functions.

    Raises:
        UserError: there is no such module or function, it does not take the arguments, or a name stands twice.
    """
    found = [_opened(reward, f"rewards.{at}") for at, reward in enumerate(rewards)]
    names = [one.name for one in found]
    for at, name in enumerate(names):
        if name in names[:at]:
            raise UserError(f"two rewards are called {name!r}", key=f"rewards.{at}.name", hint="give each a name")
    return found


def imported(spelled: str, key: str) -> Any:
    """What `package.module:name` names.

    Raises:
        UserError: there is no such module, or nothing in it of that name.
    """
    module, _, name = spelled.partition(":")
    if not name:
        raise UserError(f"{spelled!r} names no module", key=key, hint="write package.module:name")
    try:
        opened = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"can't import {module}: {error}", key=key, hint="is its folder on PYTHONPATH?") from error
    found = getattr(opened, name, None)
    if not callable(found):
        known = [other for other, value in vars(opened).items() if callable(value) and other[0] != "_"]
        raise UserError(f"{module} has no {name!r} that can be called", key=key, hint=nearest(name, known))
    return found


def _opened(reward: Reward, key: str) -> Opened:
    function = imported(reward.function, f"{key}.function")
    parameters = inspect.signature(function).parameters
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    for name in reward.arguments:
        if name not in parameters and not takes_any:
            raise UserError(f"{reward.function} takes none", key=f"{key}.arguments.{name}",
                            hint=nearest(name, parameters))  # fmt: skip

    @functools.wraps(function)
    def called(**given: Any) -> list[float | None]:
        try:
            return list(function(**given, **reward.arguments))
        except CordeeError:
            raise
        except Exception as error:
            raise UserError(f"raises {type(error).__name__}: {error}", key=key) from error

    called.__name__ = reward.called  # what TRL calls it
    return Opened(reward.called, reward.weight, called)
