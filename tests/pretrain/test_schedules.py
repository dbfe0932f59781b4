import math

import pytest

from pretrain.training.schedules import warmup_stable_decay


def test_the_rate_rises_stays_and_falls_as_one_minus_the_square_root():
    factors = [warmup_stable_decay(step, 100, 10, 20, 0.1) for step in range(100)]
    assert factors[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert set(factors[10:81]) == {1.0}
    assert factors[80:] == [pytest.approx(1 - 0.9 * math.sqrt(into / 20)) for into in range(20)]
    assert warmup_stable_decay(100, 100, 10, 20, 0.1) == pytest.approx(0.1)


def test_without_warm_up_and_decay_it_is_constant():
    assert {warmup_stable_decay(step, 7, 0, 0, 0.0) for step in range(7)} == {1.0}
