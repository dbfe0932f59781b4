import math
import random

import pytest

from eval.measuring.statistics import (
    Change,
    answer_bits,
    document_bits,
    holm,
    paired_change,
    ratio_mean,
    smooth,
    unpaired_change,
)


def test_with_weights_of_one_the_error_is_the_sample_deviation_over_the_root_of_the_count():
    """1, 0, 1, 1: mean 3/4; squares 3 · 1/16 + 9/16 = 3/4; error = sqrt(3/4 / 3 / 4) = 1/4."""
    assert ratio_mean([1, 0, 1, 1], [1, 1, 1, 1]) == (0.75, pytest.approx(0.25))


def test_bits_per_byte_divides_all_bits_by_all_bytes():
    """30 bits over 10 bytes and 10 over 10: 40 / 20 = 2; residuals +10 and -10; error = sqrt(2 · 200) / 20 = 1."""
    assert ratio_mean([30, 10], [10, 10]) == (2.0, pytest.approx(1.0))
    assert ratio_mean([30, 5], [10, 25])[0] == 1.0, "long documents weigh more: not the mean of 3 and 0.2"


def test_the_bytes_are_those_of_the_text_that_is_scored():
    """Two characters of two bytes each; the question beside an answer does not count."""
    assert document_bits({"text": "éé"}, [(-3.0, False)]) == {"bits_per_byte": (-3.0, 4)}
    assert answer_bits({"question": "Which?", "answer": "éé"}, [(-3.0, True)]) == {"bits_per_byte": (-3.0, 4)}


def test_one_document_has_no_error_and_none_is_refused():
    assert ratio_mean([3.0], [2.0]) == (1.5, None)
    with pytest.raises(ValueError, match="0 values with 0 weights"):
        ratio_mean([], [])
    with pytest.raises(ValueError, match="2 values with 1 weights"):
        ratio_mean([1.0, 2.0], [1.0])


def test_a_paired_change_takes_the_errors_of_the_differences():
    """Differences 1, 0, 0, 1: mean 1/2; squares 4 · 1/4; error = sqrt(1/3 / 4) = sqrt(1/12)."""
    change = paired_change([0, 1, 0, 0], [1, 1, 0, 1], [1] * 4)
    assert (change.value, change.rows, change.paired) == (0.5, 4, True)
    assert change.standard_error == pytest.approx(math.sqrt(1 / 12))


def test_pairing_sees_what_unpaired_errors_hide():
    before = [float(number) for number in range(40)]
    after = [value + 0.5 + 0.01 * (-1) ** index for index, value in enumerate(before)]
    paired = paired_change(before, after, [1.0] * 40)
    unpaired = unpaired_change(*ratio_mean(before, [1.0] * 40), *ratio_mean(after, [1.0] * 40))
    assert paired.value == pytest.approx(unpaired.value)
    assert paired.p_value < 1e-6
    assert unpaired.p_value > 0.8


def test_unpaired_errors_add_in_squares():
    change = unpaired_change(1.0, 0.3, 2.0, 0.4)
    assert (change.value, change.standard_error, change.paired) == (1.0, pytest.approx(0.5), False)
    assert unpaired_change(1.0, None, 2.0, 0.4).standard_error is None
    assert unpaired_change(1.0, None, 2.0, 0.4).p_value is None


@pytest.mark.parametrize(("z", "p"), [(0.0, 1.0), (1.0, 0.317311), (1.959964, 0.05), (2.575829, 0.01)])
def test_p_values_are_those_of_the_normal_distribution(z, p):
    assert Change(-z, 1.0, paired=True, rows=9).p_value == pytest.approx(p, abs=1e-6)


def test_without_spread_only_no_change_is_chance():
    assert Change(0.0, 0.0, paired=True, rows=9).p_value == 1.0
    assert Change(0.1, 0.0, paired=True, rows=9).p_value == 0.0


def test_holm_by_hand():
    """Sorted 0.01, 0.03, 0.04 times 3, 2, 1: 0.03, 0.06, and 0.04 is raised to 0.06."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_false_alarms_at_five_percent():
    rng = random.Random(3)  # noqa: S311 - no secret
    families = [[rng.random() for _ in range(10)] for _ in range(2000)]
    assert 0.03 < sum(min(holm(family)) < 0.05 for family in families) / 2000 < 0.07


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = random.Random(5)  # noqa: S311 - no secret
    held = 0
    for _ in range(1000):
        weights = [rng.randint(50, 400) for _ in range(100)]
        mean, error = ratio_mean([size * rng.gauss(2.0, 0.4) for size in weights], weights)
        held += abs(mean - 2.0) < 1.96 * error
    assert 920 < held < 975


def test_smoothing_keeps_a_line_straight_and_a_constant_as_it_is():
    assert smooth([2.0] * 7, 3) == [2.0] * 7
    assert smooth([0.0, 1.0, 2.0, 3.0, 4.0], 3)[1:-1] == [1.0, 2.0, 3.0]
