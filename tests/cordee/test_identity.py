"""The identity holds what a result depends on; what says only how to execute is no part of it."""

import pytest
from toys.spring import Config

from cordee import identity
from cordee.config import Input


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
        of(Config.model_construct(number=float("inf"), text="", source=None))


def test_the_fingerprint_is_the_same_in_every_process():
    assert identity.fingerprint({"b": 1, "a": ["é", 0.1]}) == (
        "ebaad9bbb904d508031788c99d65e40b6a78c5be1580484344700e945a823fb5"
    )
