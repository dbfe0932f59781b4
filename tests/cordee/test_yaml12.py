"""YAML is read as version 1.2 has it, merges included; a key stands once in each mapping, as it is written."""

import pytest
import yaml

from cordee import yaml12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("1e-5", 1e-5),
        ("0o17", "0o17"),
        ("017", 17),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
    ],
)
def test_a_word_is_what_version_1_2_says(text, value):
    assert yaml12.parse(text) == value


def test_a_key_that_overrides_a_merged_one_stands_once():
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, x: 4}\n<<: *b\nx: 5\n"
    read = yaml12.parse(text)
    assert (read["b"], read["c"]) == ({"x": 3, "y": 2}, {"x": 4, "y": 2})
    assert (read["x"], read["y"]) == (5, 2)


@pytest.mark.parametrize("text", ["{x: 1, x: 2}", "a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}", "a: &a {b: *a}", "!!bool x"])
def test_what_stands_twice_or_within_itself_is_an_error(text):
    with pytest.raises(yaml.YAMLError):
        yaml12.parse(text)
