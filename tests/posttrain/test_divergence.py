"""The losses of distillation: arithmetic by hand in float64, finite differences, TRL's own; and the sampling."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from cordee.seeds import seed_of
from posttrain.training import divergence, sampling

P, Q = (0.5, 0.3, 0.2), (0.2, 0.2, 0.6)
"""A teacher's and a student's distribution over three tokens."""


def logits(probabilities: tuple[float, ...], shift: float = 0.0) -> torch.Tensor:
    """`[1, 3]`, float64; a shift of all logits changes no probability."""
    return torch.tensor([probabilities], dtype=torch.float64).log() + shift


def kl(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    return sum(one * math.log(one / other) for one, other in zip(p, q, strict=True))


def by_hand(beta: float) -> float:
    """Equation 1 of the paper; at its ends KL(P‖Q) and KL(Q‖P)."""
    if beta in (0.0, 1.0):
        return kl(P, Q) if beta == 0 else kl(Q, P)
    mixture = tuple(beta * p + (1 - beta) * q for p, q in zip(P, Q, strict=True))
    return beta * kl(P, mixture) + (1 - beta) * kl(Q, mixture)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_divergence_is_that_of_the_paper(beta: float) -> None:
    found = divergence.generalized_jsd(logits(Q, 3.0), logits(P, -1.0), beta)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(by_hand(beta), abs=1e-12)


def test_forward_kl_by_hand() -> None:
    """0.5 ln 2.5 + 0.3 ln 1.5 + 0.2 ln (1/3) = 0.3600623…"""
    expected = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3)
    assert divergence.generalized_jsd(logits(Q), logits(P), 0.0).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("beta", [1e-5, 1 - 1e-5])
def test_its_ends_are_the_limits_of_what_is_divided(beta: float) -> None:
    divided = divergence.generalized_jsd(logits(Q), logits(P), beta) / min(beta, 1 - beta)
    assert divided.item() == pytest.approx(by_hand(round(beta)), rel=1e-4)


def test_a_temperature_divides_both_logits() -> None:
    found = divergence.generalized_jsd(logits(Q), logits(P), 0.5, temperature=2.0)
    softer = [torch.tensor(one, dtype=torch.float64).sqrt() for one in (Q, P)]
    expected = divergence.generalized_jsd(*((one / one.sum()).log()[None] for one in softer), 0.5)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(beta: float, weight: float) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.tensor([0, 3, 6, 2])

    def loss(given: torch.Tensor) -> torch.Tensor:
        keys = {"beta": beta, "temperature": 1.5, "cross_entropy_weight": weight}
        return divergence.mixed(given, teacher, targets, **keys)[0].sum()

    assert torch.autograd.gradcheck(loss, student.requires_grad_(), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_trl_computes_the_same(beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(2, 9, 11, generator=generator) for _ in range(2))
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=0.7, reduction="none").sum(-1)
    ours = divergence.generalized_jsd(student.flatten(0, 1), teacher.flatten(0, 1), beta, 0.7)
    torch.testing.assert_close(ours, theirs.flatten(), atol=1e-6, rtol=1e-5)


def test_equal_distributions_are_at_0_and_nothing_is_below() -> None:
    generator = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(64, 5, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    for beta in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert divergence.generalized_jsd(teacher + 2.0, teacher, beta).abs().max() < 1e-12
        assert (divergence.generalized_jsd(student, teacher, beta) > 0).all()


def test_a_token_without_probability_is_no_nan() -> None:
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]], dtype=torch.float64)
    found = divergence.generalized_jsd(logits(Q), teacher, 0.0)
    assert found.item() == pytest.approx(2 * 0.5 * math.log(0.5 / 0.2), abs=1e-12)


def test_the_mixed_loss_and_its_figures_by_hand() -> None:
    targets = torch.tensor([2])
    keys = {"beta": 0.0, "temperature": 1.0, "cross_entropy_weight": 0.25}
    loss, figures = divergence.mixed(logits(Q), logits(P), targets, **keys)
    assert loss.item() == pytest.approx(0.75 * kl(P, Q) - 0.25 * math.log(0.6), abs=1e-12)
    assert figures["divergence"].item() == pytest.approx(kl(P, Q))
    assert figures["cross_entropy"].item() == pytest.approx(-math.log(0.6))
    assert figures["entropy"].item() == pytest.approx(-sum(q * math.log(q) for q in Q))
    assert figures["mean_token_accuracy"].item() == 1.0


def noisy(scores: torch.Tensor, seeds: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Scores with the noise of a first draw, each row's by its seed."""
    asked = torch.zeros(len(scores), 1, dtype=torch.long)
    return sampling.SeededSampling(sampling.SamplingSettings(temperature, 1), seeds, 1, torch.ones_like(asked))(
        asked, scores
    )


def test_noise_draws_from_the_softmax() -> None:
    """20,000 draws: each frequency within four standard errors of its probability."""
    count, temperature = 20_000, 0.5
    scores = logits(P).float().expand(count, -1)
    drawn = noisy(scores, range(count), temperature).argmax(-1)
    expected = torch.tensor(P).double() ** (1 / temperature)
    expected /= expected.sum()
    found = torch.bincount(drawn, minlength=3).double() / count
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt()).all()


def test_a_row_s_noise_depends_on_its_seed_alone() -> None:
    asked, scores = torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 8)
    how = sampling.SamplingSettings(1.0, 3)
    together, alone = (sampling.SeededSampling(how, seeds, 1, torch.ones(len(seeds), 1)) for seeds in ([4, 5, 6], [5]))
    for _ in range(3):
        torch.rand(7)  # another user of torch's own generator
        assert together(asked, scores)[1].equal(alone(asked[:1], scores[:1])[0])


def test_seeds_of_rows_and_steps_differ() -> None:
    seeds = {seed_of(seed, step, place) for seed in range(3) for step in range(10) for place in range(10)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert isinstance(np.int64(next(iter(seeds))), np.int64)
