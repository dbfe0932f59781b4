"""The command line and the report print a number in the same unit."""

import pytest

from cordee import units


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (units.size, 999, "999 B"),
        (units.size, 2_345_678, "2.35 MB"),
        (units.size, 25_000_000_000, "25 GB"),
        (units.size, 999_600_000, "1,000 MB"),
        (units.size, None, units.NO_VALUE),
        (units.count, 5_412, "5,412"),
        (units.count, 5_412_000, "5.41 M"),
        (units.count, 2e15, "2,000 T"),
        (units.duration, 59.9, "59.9 s"),
        (units.duration, 185, "3 min 05 s"),
        (units.duration, 7_800, "2 h 10 min"),
    ],
)
def test_a_number_is_shown_with_its_unit(show, value, text):
    assert show(value) == text
