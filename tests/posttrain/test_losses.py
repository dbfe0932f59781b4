"""Preference losses: arithmetic worked by hand, and gradients against finite differences in float64."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cordee import peek
from posttrain.losses import cpo, dpo, kto, orpo, qrpo, quantiles
from posttrain.losses.pairs import Pairs, certainty, divergence, token_weights
from posttrain.losses.rewards import alphapo

PLAIN = {"beta": 0.5, "label_smoothing": 0.1, "discopop_tau": 0.05, "f_divergence_type": "reverse_kl"}
PLAIN |= {"f_alpha_divergence_coef": 0.5}


def settings(**given: Any) -> Any:
    return SimpleNamespace(**PLAIN | given)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(chosen: torch.Tensor, rejected: torch.Tensor, **given: Any) -> Pairs:
    """Pairs whose reference log-probabilities are -4 and -6, of 2 and 5 tokens."""
    reference = torch.full_like(chosen, -4.0), torch.full_like(chosen, -6.0)
    tokens = torch.full_like(chosen, 2.0), torch.full_like(chosen, 5.0)
    return Pairs(chosen, rejected, *reference, *tokens, chosen_nll=-chosen, **{"tokens_per_pair": 2.0, **given})


def softplus(value: float) -> float:
    """-log sigmoid(-value)."""
    return math.log1p(math.exp(value))


H_W, H_L = 1.0, -0.4
"""log π - log π_ref of an answer with -3 against -4, and of one with -6.4 against -6."""
BY_HAND = {
    # β(h_w - h_l) = 0.5 · 1.4 = 0.7
    "sigmoid": softplus(-0.7),
    "hinge": 0.3,
    # 1/2 + 0.4/5 - 1/(2 · 0.5) = 0.58 - 1
    "ipo": 0.42**2,
    # 0.5 · 0.58 = 0.29
    "sigmoid_norm": softplus(-0.29),
    # p = 1/(1 + e^-0.7) = 0.668188; 0.668188 · ln(0.668188/0.9) + 0.331812 · ln(0.331812/0.1)
    "exo_pair": 0.6681877721681662 * math.log(0.6681877721681662 / 0.9)
    + 0.3318122278318339 * math.log(0.3318122278318339 / 0.1),
    # βh_w = 0.5, βh_l = -0.2
    "nca_pair": softplus(-0.5) + 0.5 * softplus(0.5) + 0.5 * softplus(-0.2),
    "robust": (0.9 * softplus(-0.7) - 0.1 * softplus(0.7)) / 0.8,
    "bco_pair": softplus(-0.5) + softplus(-0.2),
    # 1/(2β) = 1: (1 - 1)² + (-0.4 + 1)²
    "sppo_hard": 0.36,
    # one pair alone: β(log π(y_w) - log π(y_l) - (-4 + 6)) = 0.5 · (-3 + 6.4 - 2) = 0.7
    "aot": 0.9 * softplus(-0.7) + 0.1 * softplus(0.7),
    "aot_unpaired": 0.9 * softplus(-0.7) + 0.1 * softplus(0.7),
    # 1 - sigmoid(0.5) + sigmoid(-0.2) = 0.377541 + 0.450166
    "apo_zero": 0.3775406687981454 + 0.4501660026875221,
    # sigmoid(0.5) + 1 - sigmoid(0.7) = 0.622459 + 0.331812
    "apo_down": 0.6224593312018546 + 0.3318122278318339,
    # m = sigmoid(0.7/0.05) = sigmoid(14)
    "discopop": (1 - 1 / (1 + math.exp(-14))) * softplus(-0.7) + math.exp(-0.7) / (1 + math.exp(-14)),
    # 3 nats over 2 tokens
    "sft": 1.5,
}


def test_every_loss_is_worked_by_hand() -> None:
    assert set(BY_HAND) == set(peek.functions("posttrain.losses.dpo"))


@pytest.mark.parametrize("name", BY_HAND)
def test_a_loss_of_pairs_is_what_its_equation_gives(name: str) -> None:
    (found,) = getattr(dpo, name)(pairs(doubles(-3.0), doubles(-6.4)), settings())
    assert float(found) == pytest.approx(BY_HAND[name], rel=1e-12)


def test_sorted_losses_pair_the_values_of_a_step() -> None:
    """By hand: π differences 3, 1, 2 sorted against 0, 5, 1 of the reference: 1-0, 2-1, 3-5."""
    chosen, rejected = doubles(3, 1, 2), doubles(0, 0, 0)
    given = Pairs(chosen, rejected, doubles(0, 5, 1), rejected, *[doubles(1, 1, 1)] * 2, -chosen, 1.0)
    found = dpo.aot(given, settings(label_smoothing=0.0))
    assert found.tolist() == pytest.approx([softplus(-0.5 * delta) for delta in (3 - 5, 1 - 0, 2 - 1)])
    # h_w = 3, -4, 1 and h_l = 0, -1, 2: sorted -4 against -1, 1 against 0, 3 against 2
    given = Pairs(chosen, doubles(0, -1, 2), doubles(0, 5, 1), doubles(0, 0, 0), *[doubles(1, 1, 1)] * 2, -chosen, 1.0)
    found = dpo.aot_unpaired(given, settings(label_smoothing=0.0))
    assert found.tolist() == pytest.approx([softplus(-0.5 * delta) for delta in (3 - 2, -4 + 1, 1 - 0)])


def differences(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """The gradient by central differences."""
    step, found = 1e-6, torch.empty_like(at)
    for place in range(len(at)):
        moved = torch.zeros_like(at)
        moved[place] = step
        found[place] = (function(at + moved) - function(at - moved)) / (2 * step)
    return found


def check(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> None:
    at = at.clone().requires_grad_()
    function(at).backward()
    assert at.grad is not None
    torch.testing.assert_close(at.grad, differences(function, at.detach()), rtol=1e-5, atol=1e-8)


OTHER_DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "reverse_kl") for name in BY_HAND]
    + [(name, kind) for name in sorted(dpo.OF_DIFFERENCES) for kind in OTHER_DIVERGENCES],
)
def test_gradients_are_the_differences(name: str, kind: str) -> None:
    def mean(values: torch.Tensor) -> torch.Tensor:
        given = pairs(*values.chunk(2), tokens_per_pair=2.0)
        return getattr(dpo, name)(given, settings(f_divergence_type=kind)).mean()

    check(mean, doubles(-3.0, -4.7, -2.2, -5.1, -6.4, -5.3, -7.7, -6.1))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "sft"])
def test_a_step_in_parts_is_the_whole_step(name: str) -> None:
    values = doubles(-3.0, -4.7, -2.2, -5.1), doubles(-6.4, -5.3, -7.7, -6.1)
    whole = [one.clone().requires_grad_() for one in values]
    expected = getattr(dpo, name)(pairs(*whole, tokens_per_pair=2.0), settings()).mean()
    expected.backward()
    parts = [one.clone().requires_grad_() for one in values]
    step = pairs(*values)
    total = 0.0
    for at in (torch.tensor([2, 0]), torch.tensor([3]), torch.tensor([1])):
        some = pairs(parts[0][at], parts[1][at], step=step, at=at)
        loss = getattr(dpo, name)(some, settings()).sum() / 4
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(expected.detach()), rel=1e-12)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_divergences_by_hand() -> None:
    """t = e^0.5 = 1.648721."""
    ratio = doubles(0.5)
    assert float(divergence(ratio, settings(f_divergence_type="forward_kl"))) == pytest.approx(1 - math.exp(-0.5))
    found = float(divergence(ratio, settings(f_divergence_type="js_divergence")))
    assert found == pytest.approx(math.log(2 * math.exp(0.5) / (1 + math.exp(0.5))))
    found = float(divergence(ratio, settings(f_divergence_type="alpha_divergence")))
    assert found == pytest.approx((math.exp(0.5 * -0.5) - 1) / -0.5)
    same = settings(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    assert float(divergence(ratio, same)) == 0.5


def test_tokens_behind_the_shorter_side_weigh_less() -> None:
    is_answer = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    shared = torch.tensor([1, 1])
    assert token_weights(is_answer, shared, 0.25).tolist() == [[0, 1, 0.25, 0.25, 0], [0, 0, 1, 0, 0]]
    assert token_weights(is_answer, shared, None).tolist() == is_answer.float().tolist()


def test_the_certainty_of_an_answer_by_hand() -> None:
    """Log-probabilities -1 and -3 with log Σp² -0.5 and -1.5: exp((-0.5 - 1.5)/2)."""
    logprobs, squares = doubles(-1, -3, -9)[None], doubles(-0.5, -1.5, -2)[None]
    is_answer = torch.tensor([[True, True, False]])
    assert float(certainty(logprobs.requires_grad_(), squares, is_answer)) == pytest.approx(math.exp(-1))
    assert not certainty(logprobs, squares, is_answer).requires_grad


GOOD = torch.tensor([True, False])
KTO = settings(beta=0.5, desirable_weight=1.0, undesirable_weight=2.0)


def test_kto_by_hand() -> None:
    """h = 1 and 0.4, z = 0.2: 1 - sigmoid(0.5 · 0.8) and 2 · (1 - sigmoid(0.5 · (0.2 - 0.4)))."""
    ratio, kl = doubles(1.0, 0.4), doubles(0.2)[0]
    expected = [1 / (1 + math.exp(0.4)), 2 / (1 + math.exp(-0.1))]
    assert kto.kto(ratio, GOOD, kl, KTO).tolist() == pytest.approx(expected)
    expected = [1 / (1 + math.exp(0.5)), 2 / (1 + math.exp(-0.2))]
    assert kto.apo_zero_unpaired(ratio, GOOD, kl, KTO).tolist() == pytest.approx(expected)
    for name in ("kto", "apo_zero_unpaired"):
        check(lambda values, name=name: getattr(kto, name)(values, GOOD, kl, KTO).mean(), ratio)


def test_orpo_by_hand() -> None:
    """Means of -0.5 and -2: p = 0.606531 and 0.135335; odds 1.541494 and 0.156518."""
    chosen, rejected = doubles(-0.5), doubles(-2.0)
    odds = [math.exp(value) / (1 - math.exp(value)) for value in (-0.5, -2.0)]
    ratio = math.log(odds[0] / odds[1])
    assert float(orpo.log_odds_ratio(chosen, rejected)) == pytest.approx(ratio)
    loss = orpo.orpo(doubles(1.5), orpo.log_odds_ratio(chosen, rejected), 0.1)
    assert float(loss) == pytest.approx(1.5 + 0.1 * softplus(-ratio))

    def mean(values: torch.Tensor) -> torch.Tensor:
        return orpo.orpo(-values[:2], orpo.log_odds_ratio(*values.chunk(2)), 0.3).mean()

    check(mean, doubles(-0.5, -2.5, -2.0, -0.1))
    assert torch.isfinite(
        torch.autograd.grad(mean(extreme := doubles(-1e-6, -90, -40, -1e-3).requires_grad_()), extreme)[0]
    ).all()


def test_cpo_by_hand() -> None:
    given = settings(beta=0.5, simpo_gamma=0.3)
    expected = {
        "sigmoid": 0.9 * softplus(-0.7) + 0.1 * softplus(0.7),
        "hinge": 0.3,
        "ipo": 0.4**2,
        "simpo": 0.9 * softplus(-0.4) + 0.1 * softplus(0.4),
    }
    assert set(expected) == set(peek.functions("posttrain.losses.cpo"))
    for name, value in expected.items():
        assert float(getattr(cpo, name)(doubles(1.4), given)) == pytest.approx(value), name
        check(lambda values, name=name: getattr(cpo, name)(values, given).mean(), doubles(1.4, -0.3, 2.6))
    assert float(alphapo(doubles(-0.5), 0.0)) == -0.5
    assert float(alphapo(doubles(-0.5), 0.25)) == pytest.approx((1 - math.exp(0.125)) / 0.25)


def test_quantiles_are_shares_of_the_references() -> None:
    nan = math.nan
    references = torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 7.0, nan], [1.0, 2.0, nan, nan]], dtype=torch.float64)
    found, count = qrpo.quantiles(doubles(2.0, 5.0, 0.5), references)
    assert found.tolist() == pytest.approx([0.75, 2 / 3, 0.0])
    assert count.tolist() == [4, 3, 2]


@pytest.mark.parametrize("beta", [0.003, 0.03, 0.1, 0.5, 2.0, 50.0])
@pytest.mark.parametrize("name", peek.functions("posttrain.losses.quantiles"))
def test_partition_functions_are_the_integrals(name: str, beta: float) -> None:
    """log Z = log ∫ exp(f(u)/β) du over (0, 1), by the midpoint rule, in a scale where it does not overflow."""
    if name == "normal_icdf" and beta < 0.5:
        pytest.skip("nearly all of the integral lies closer to 1 than floats are apart")
    count = 1_000_000
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    betas = torch.full((count,), beta, dtype=torch.float64)
    value, beta_log_z = getattr(quantiles, name)(middles, torch.full((count,), float(count)), betas)
    expected = torch.logsumexp(value / beta, 0) - math.log(count)
    assert float(beta_log_z[0] / beta) == pytest.approx(float(expected), abs=2e-3 if name == "normal_icdf" else 1e-4)


def test_small_betas_lose_no_digits_and_have_a_gradient() -> None:
    """β log Z = β log β + 1 where exp(-1/β) is 0."""
    for beta in (1e-4, 1e-3, 0.03):
        _, found = quantiles.identity(torch.zeros(1), torch.ones(1), torch.tensor([beta]))
        assert float(found) == pytest.approx(beta * math.log(beta) + 1, rel=1e-6)


def test_beta_is_divided_by_the_length() -> None:
    tokens = torch.tensor([10.0, 100.0, 500.0])
    assert qrpo.betas(5.0, tokens, length_normalization=True, largest=0.1).tolist() == pytest.approx([0.1, 0.05, 0.01])
    assert qrpo.betas(5.0, tokens, length_normalization=True, largest=None).tolist() == pytest.approx([0.5, 0.05, 0.01])
    assert qrpo.betas(0.05, tokens, length_normalization=False, largest=0.1).tolist() == pytest.approx([0.05] * 3)


def test_qrpo_by_hand() -> None:
    """u = 0.75, β = 0.5: β log Z = 0.5 · log(0.5 · (e² - 1)) = 0.580751; (0.75 - 0.580751 - 0.5 · 0.3)²."""
    beta = doubles(0.5)
    reward, beta_log_z = quantiles.identity(doubles(0.75), doubles(4), beta)
    assert float(beta_log_z) == pytest.approx(0.5 * math.log(0.5 * (math.exp(2) - 1)))
    found = qrpo.qrpo(doubles(0.3), reward, beta_log_z, beta)
    assert float(found) == pytest.approx((0.75 - 0.5 * math.log(0.5 * (math.exp(2) - 1)) - 0.15) ** 2)
    check(lambda ratio: qrpo.qrpo(ratio, reward, beta_log_z, beta).mean(), doubles(0.3, -2.0))


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.1])
def test_the_minimum_over_a_whole_support_is_the_closed_form(beta: float) -> None:
    """Six completions, of which each stands for the quantiles of its share: the reward is β times the log of the mean
    of exp(u/β) over the share, so that Z is that of a continuum. Descent finds π* = π_ref exp(R/β)/Z."""
    reference = torch.log_softmax(torch.linspace(-1, 1, 6, dtype=torch.float64), 0)
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), reference.exp().cumsum(0)])
    means = beta * torch.diff(torch.exp((ends - 1) / beta)) / reference.exp()
    rewards = 1 + beta * torch.log(means)
    betas = torch.full((6,), beta, dtype=torch.float64)
    _, beta_log_z = quantiles.identity(rewards, betas, betas)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        ratio = torch.log_softmax(logits, 0) - reference
        loss = (reference.exp() * qrpo.qrpo(ratio, rewards, beta_log_z, betas)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(closure()) < 1e-12
    found = torch.log_softmax(logits.detach(), 0)
    torch.testing.assert_close(found, reference + (rewards - beta_log_z) / beta, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, torch.log_softmax(reference + rewards / beta, 0), atol=1e-5, rtol=0)


def test_levels_are_recovered_and_not_only_an_order() -> None:
    """Of two prompts with two answers each, both low in one and both high in the other: the implied rewards of QRPO are
    the quantiles, up to the constant that it knows; DPO's are the same margin in both."""
    reference = torch.log_softmax(torch.zeros(2, 50, dtype=torch.float64), 1)
    ranks = torch.stack([torch.arange(50), torch.arange(50)]).double() / 50 + 0.01
    seen = torch.tensor([[2, 7], [40, 45]])
    logits = reference.clone().requires_grad_()
    beta = 0.2
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(3000):
        optimizer.zero_grad()
        ratio = (torch.log_softmax(logits, 1) - reference).gather(1, seen).reshape(-1)
        betas = torch.full_like(ratio, beta)
        rewards, beta_log_z = quantiles.identity(ranks.gather(1, seen).reshape(-1), torch.full_like(ratio, 1e9), betas)
        qrpo.qrpo(ratio, rewards, beta_log_z, betas).mean().backward()
        optimizer.step()
    ratio = (torch.log_softmax(logits.detach(), 1) - reference).gather(1, seen)
    implied = beta * ratio + beta_log_z[0]
    torch.testing.assert_close(implied, ranks.gather(1, seen), atol=1e-3, rtol=0)
    assert float(implied[1].mean() - implied[0].mean()) == pytest.approx(0.76, abs=1e-2)
