"""How a recipe names rewards: a list, each a function with its arguments, a reward model, or a judge.

    rewards:
      - {name: correct, function: number_match, weight: 1.0}
      - {function: mypackage.rewards:brevity, most: 40}
      - {function: "trl.rewards:think_format_reward"}
      - {model: $reward, weight: 0.5}
      - {judge: models/judge, constitution: constitution.md}

A stage takes it as its key `rewards`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from cordee import peek
from cordee.config import Config, Execution, Input
from cordee.errors import nearest
from cordee.model_folder import ModelInput

OWN = "posttrain.rewards.functions"
"""The module of the functions that are named without one."""
BATCH = {"prompts", "completions", "completion_ids"}
"""What every reward function is given, beside the rows' columns."""
KINDS = ("function", "model", "judge")
ENGINE = ("transformers", "vllm")
"""What `auto` is without vLLM, and with it."""
OF_FUNCTION = ("arguments", "code")
OF_JUDGE = ("constitution", "compare", "engine")


class Reward(Config):
    """One reward: exactly one of `function`, `model` and `judge`."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None = None
    """What it is called in rows, metrics and logs; by default the function's name, `model` or `judge`."""
    weight: float = 1.0
    """Its part in the sum."""
    function: str | None = None
    """A function of `posttrain.rewards.functions` by its name, or any other as `package.module:function`; called as
    TRL calls reward functions. One that takes none of a batch (`completions`, `completion_ids`,
    `prompts`) is called with its arguments, and returns one."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """The function's own arguments; they may also stand beside its name."""
    code: Input | None = None
    """The file of a function of one's own, whose content is part of the identity; filled in by itself."""
    model: ModelInput | None = None
    """A reward model: a folder with a sequence classification head of one label (`$reward`)."""
    judge: ModelInput | None = None
    """A language model that rates answers from 1 to 9, or compares them; the reward is what it expects to say."""
    constitution: Input | None = None
    """A text file that tells the judge what a good answer is."""
    compare: bool = False
    """Whether the judge compares each two answers to a prompt, in both orders, instead of rating each; the reward is
    the mean probability that it prefers the answer to another one."""
    engine: Literal["auto", "vllm", "transformers"] | None = None
    """What the judge runs in; `auto`, if not given: vLLM where it is installed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What a model or a judge computes in; `auto`: as it is stored, but vLLM takes bfloat16 for float32."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest request to a model or a judge, in tokens; a longer one is an error. Without it, all its positions."""
    batch_size: Execution[int] = Field(default=16, ge=1)
    """Rows that a model, or a judge in transformers, reads at once."""

    @model_validator(mode="before")
    @classmethod
    def _sorted_out(cls, given: Any) -> Any:
        """Put a function's arguments in their place, and see that it is there and takes them."""
        if not isinstance(given, dict):
            return given
        named = [kind for kind in KINDS if given.get(kind) is not None]
        if len(named) != 1:
            raise ValueError(f"needs one of {', '.join(KINDS)}, and has {' and '.join(named) or 'none of them'}")
        if named == ["function"]:
            return cls._of_function(given)
        if wrong := [name for name in OF_FUNCTION if given.get(name)]:
            raise ValueError(f"{wrong[0]} is for a function, and this is a {named[0]}")
        if named == ["judge"]:
            engine = given.get("engine") or "auto"
            return {**given, "engine": ENGINE[peek.is_installed("vllm")] if engine == "auto" else engine}
        if wrong := [name for name in OF_JUDGE if given.get(name)]:
            raise ValueError(f"{wrong[0]} is for a judge, and this is a {named[0]}")
        return given

    @classmethod
    def _of_function(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The keys of a function: what a model or a judge has a key for (`max_length`) is an argument of it too."""
        own, written = {"name", "weight", *KINDS, *OF_FUNCTION}, given.get("arguments") or {}
        if not isinstance(given["function"], str) or not isinstance(written, dict):
            return given
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        is_dump = given.keys() >= cls.model_fields.keys()  # read again: a default is a key that nobody wrote
        beside = {
            name: value
            for name, value in given.items()
            if name not in own and not (is_dump and name in defaults and value == defaults[name])
        }
        kept = {name: value for name, value in given.items() if name in own}
        arguments = _checked(given["function"], {**written, **beside})
        return {"code": code_of(given["function"]), **kept, "arguments": arguments}

    @property
    def label(self) -> str:
        """Its name."""
        if self.name:
            return self.name
        return place_of(self.function)[1] if self.function else "model" if self.model else "judge"


def _distinct(rewards: list[Reward]) -> list[Reward]:
    labels = [reward.label for reward in rewards]
    if again := next((label for at, label in enumerate(labels) if label in labels[:at]), None):
        raise ValueError(f"two are called {again!r}: give one of them another `name`")
    return rewards


RewardList = Annotated[list[Reward], AfterValidator(_distinct)]
"""Rewards with a name each."""


def place_of(function: str) -> tuple[str, str]:
    """The module and the name of a function as a recipe names it."""
    module, colon, name = function.partition(":")
    return (module, name) if colon else (OWN, function)


def code_of(function: str) -> str | None:
    """The file of a function, unless it is of an installed package, or of this project."""
    file = peek.source_of(place_of(function)[0])
    is_own = file is not None and place_of(function)[0] != OWN and "site-packages" not in file.parts
    return str(file) if is_own else None


def parameters_of(function: str) -> dict[str, peek.Parameter]:
    """The parameters of a function as a recipe names it, read from its source.

    Raises:
        ValueError: there is no such function.
    """
    module, name = place_of(function)
    if "." in function and module == OWN:
        package, _, last = function.rpartition(".")
        raise ValueError(f"function: no reward {function!r}; did you mean '{package}:{last}'?")
    if peek.source_of(module) is None:
        hint = "one in the current folder is found with PYTHONPATH=."
        raise ValueError(f"function: there is no module {module!r}, or its source is not there; {hint}")
    found = peek.parameters(module, name)
    if found is None:
        what = f"no reward {name!r}" if module == OWN else f"{module} has no function {name!r}"
        hint = nearest(name, peek.functions(module))
        raise ValueError(f"function: {what}" + (f"; {hint}" if hint else ""))
    return found


def columns_of(function: str, arguments: Mapping[str, Any]) -> set[str]:
    """The columns without which a function can't be called."""
    found = parameters_of(function)
    return {name for name, one in found.items() if one.is_required} - BATCH - arguments.keys()


def _checked(function: str, given: dict[str, Any]) -> dict[str, Any]:
    """A function's arguments; those that are paths become inputs, so that their content counts."""
    known = parameters_of(function)
    is_own, makes_one = place_of(function)[0] == OWN, not BATCH & known.keys()
    arguments = {name: one for name, one in known.items() if name not in BATCH and (one.is_keyword or not is_own)}
    for name, value in given.items():
        if name not in arguments:
            hint = nearest(name, {*arguments, "name", "weight"})
            raise ValueError(f"{name}: {function} has no such argument" + (f"; {hint}" if hint else ""))
        _require_kind(name, value, arguments[name])
    for name, one in arguments.items():
        if one.is_required and (is_own or makes_one) and name not in given:
            raise ValueError(f"{name}: {function} needs it")
    return {name: _as_input(value, arguments[name]) for name, value in given.items()}


def _require_kind(name: str, value: Any, parameter: peek.Parameter) -> None:
    kind = str if parameter.kind is Path and not isinstance(value, Path) else parameter.kind
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{name}: {error.errors()[0]['msg']}, not {value!r}") from error


def _as_input(value: Any, parameter: peek.Parameter) -> Any:
    return Input(value) if parameter.kind is Path else value
