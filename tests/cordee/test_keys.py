"""`cordee list posttrain.sft` shows every key with its type, limits, default and meaning."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from cordee import keys, stage
from cordee.config import Config, Execution, FunctionOf, Input, Library
from cordee.errors import UserError


class Lock(Config):
    width: int = Field(default=4, ge=1, le=9)
    """Metres."""


class Canal(Config):
    flow: Literal["fast", "slow"] = "slow"
    """How it
    runs."""
    source: Input
    """Where it rises."""
    locks: list[Lock] = Field(min_length=1)
    """On its way."""
    last: Lock = Lock()
    """The last one."""
    boats: Execution[int | None] = None
    """How many."""
    pumps: Annotated[dict[str, Any], Library("trl.SFTConfig")] = Field(default_factory=dict)
    """What lifts it."""
    names: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """What people say."""
    depths: tuple[int, float] = (1, 2.5)
    """Least and most."""
    label: str = ""
    """What maps say."""


def test_a_key_has_its_type_limits_default_and_meaning():
    assert [(key.name, key.kind, key.meaning) for key in keys.of(Canal)] == [
        ("source", "reference or path, required", "Where it rises."),
        ("locks", "list of mapping, length >= 1, required", "On its way."),
        ("locks.0.width", "int, >= 1, <= 9, default 4", "Metres."),
        ("flow", "fast | slow, default slow", "How it runs."),
        ("last", "mapping, default as below", "The last one."),
        ("last.width", "int, >= 1, <= 9, default 4", "Metres."),
        ("boats", "int | null, default null, execution only", "How many."),
        ("pumps", "fields of trl.SFTConfig, default {}", "What lifts it."),
        ("names", "mapping of str to int, default {}", "What people say."),
        ("depths", "[int, float], default [1, 2.5]", "Least and most."),
        ("label", 'str, default ""', "What maps say."),
    ]


def test_a_key_that_names_a_function_lists_the_functions_and_finds_the_nearest():
    kinds = {key.name: key.kind for key in keys.of(stage.load("pretrain.train").config)}
    assert kinds["loss"] == "cross_entropy | goldfish, default cross_entropy"
    assert kinds["optimizer"] == "adamw | ademamix, default adamw"
    assert kinds["schedule"] == "wsd | cosine, default wsd"

    class Gate(Config):
        way: Annotated[str, FunctionOf("cordee.cost")] = "training_flops"
        """How it opens."""

    assert Gate(way="decoder_parameters").way == "decoder_parameters"
    with pytest.raises(UserError, match="way: no way 'decoder_parameter'; did you mean 'decoder_parameters'"):
        Gate(way="decoder_parameter")
    with pytest.raises(UserError, match="no way 'Cost'"):  # a class is no function
        Gate(way="Cost")


@pytest.mark.parametrize("uses", [uses for uses, _ in stage.find()])
def test_every_key_of_every_stage_has_a_meaning(uses):
    listed = list(keys.of(stage.load(uses).config))
    assert {key.name for key in listed} >= set(stage.load(uses).config.model_fields)
    assert all(key.meaning for key in listed)


def test_the_command_shows_them_and_knows_no_others(cordee):
    shown = cordee("list", "posttrain.sft").stdout
    assert "\ntrainer: fields of trl.SFTConfig, default {}\n    Any field of TRL's SFTConfig" in shown
    wrong = cordee("list", "posttrain.stf")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "cordee: command line: no stage 'posttrain.stf'; did you mean 'posttrain.sft'?\n",
    )
