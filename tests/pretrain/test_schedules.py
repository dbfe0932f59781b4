import math

import pytest

from pretrain.training.schedules import cosine, wsd
from pretrain.training.settings import Settings


def settings(**keys):
    given = {"max_steps": 100, "global_batch_size": 8, "sequence_length": 64, "learning_rate": 1e-3, **keys}
    return Settings.model_validate(given)


def test_wsd_rises_stays_and_falls_as_one_minus_the_square_root():
    chosen = settings(warmup_steps=10, decay_steps=20)
    factors = [wsd(step, chosen) for step in range(100)]
    assert factors[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert set(factors[10:81]) == {1.0}
    assert factors[80:] == [pytest.approx(1 - 0.9 * math.sqrt(into / 20)) for into in range(20)]
    assert wsd(100, chosen) == pytest.approx(0.1)


def test_wsd_without_warm_up_and_decay_is_constant():
    assert {wsd(step, settings(max_steps=7)) for step in range(7)} == {1.0}


def test_cosine_rises_and_falls_to_the_least():
    chosen = settings(warmup_steps=20, schedule="cosine", min_learning_rate_ratio=0.2)
    factors = [cosine(step, chosen) for step in range(101)]
    assert factors[:20] == [pytest.approx((step + 1) / 20) for step in range(20)]
    assert factors[20] == 1.0
    assert factors[60] == pytest.approx(0.6)  # half of the fall
    assert factors[20:] == [pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * into / 80))) for into in range(81)]
    assert factors[100] == pytest.approx(0.2)


def test_a_training_that_is_all_warm_up_has_no_fall():
    assert cosine(99, settings(schedule="cosine", warmup_steps=100)) == 1.0
