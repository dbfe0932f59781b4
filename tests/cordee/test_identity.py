"""The identity holds what a result depends on; what says only how to execute is no part of it."""

from typing import Annotated, Any

import pytest
from pydantic import Field
from toys.spring import Config

from cordee import identity
from cordee.config import Config as Base
from cordee.config import Input, Library
from cordee.errors import UserError


class Several(Base):
    models: dict[str, Input] = Field(default={})
    trainer: Annotated[dict[str, Any], Library("trl.SFTConfig")] = Field(default={})


def of(config: Config, seed: int = 0, source: str = "content 00") -> dict:
    return identity.of_stage("toys.spring", seed, config, {"source": source})


def test_an_execution_key_changes_nothing():
    assert of(Config(trouble="wait")) == of(Config())
    assert identity.execution(Config(trouble="wait")) == {"trouble": "wait"}


def test_an_inputs_name_is_no_part_of_it_but_its_content_is():
    one, other = Config(source=Input("a.txt")), Config(source=Input("b.txt"))
    assert of(one) == of(other)
    assert identity.fingerprint(of(one)) != identity.fingerprint(of(one, source="content 01"))


def test_the_difference_is_told_key_by_key():
    lines = list(identity.differences(of(Config(number=1e-3)), of(Config(number=5e-4), seed=1)))
    assert lines == ["number 0.001 → 0.0005", "seed 0 → 1"]


def test_a_value_that_can_not_be_written_the_same_way_twice_is_refused():
    with pytest.raises(TypeError, match="number"):
        of(Config.model_construct(number=object(), text="", source=None))


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_a_number_that_is_none_is_the_users_mistake(number):
    with pytest.raises(UserError, match=rf"r\.yaml: stages\.spring\.number: must be a finite number, not {number}"):
        identity.of_stage("toys.spring", 0, Config.model_construct(number=number), {}, ("r.yaml", "stages.spring"))
    with pytest.raises(UserError, match=r"trainer\.learning_rate: must be a finite number"):
        identity.of_stage("x", 0, Several(trainer={"learning_rate": number}), {})


def several(models: list[str], trainer: dict[str, Any]) -> dict:
    config = Several(models={name: Input(name) for name in models}, trainer=trainer)
    return identity.of_stage("x", 0, config, {f"models.{name}": f"content {name}" for name in models})


def test_the_order_of_a_mapping_counts_and_is_told():
    one, other = several(["base", "sft"], {}), several(["sft", "base"], {})
    assert identity.fingerprint(one) != identity.fingerprint(other)
    assert list(identity.differences(one, other)) == ["models order: base, sft → sft, base"]
    added = several(["base", "dpo", "sft"], {})
    assert list(identity.differences(one, added)) == ["models.dpo (none) → content dpo"]


def test_what_a_library_is_handed_has_no_order():
    one = several([], {"seed": 1, "lr_scheduler_kwargs": {"a": 1, "b": [{"c": 1, "d": 2}]}})
    other = several([], {"lr_scheduler_kwargs": {"b": [{"d": 2, "c": 1}], "a": 1}, "seed": 1})
    assert identity.fingerprint(one) == identity.fingerprint(other)


def test_the_order_in_which_a_config_has_its_fields_does_not_count():
    class Turned(Base):
        trainer: Annotated[dict[str, Any], Library("trl.SFTConfig")] = Field(default={})
        models: dict[str, Input] = Field(default={})

    one, other = (identity.of_stage("x", 0, config, {}) for config in (Several(), Turned()))
    assert identity.fingerprint(one) == identity.fingerprint(other)


def test_the_fingerprint_is_the_same_in_every_process():
    assert identity.fingerprint({"a": ["é", 0.1], "b": 1}) == (
        "ebaad9bbb904d508031788c99d65e40b6a78c5be1580484344700e945a823fb5"
    )
