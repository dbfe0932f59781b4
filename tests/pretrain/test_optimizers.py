"""Optimizers against their papers' algorithms in float64, and their state in a resume point."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard

from cordee.compute import resume
from cordee.stage import Context
from pretrain.training import optimizers
from pretrain.training.model import build
from pretrain.training.settings import Settings

MICRO = Path(__file__).parents[2] / "configs" / "models" / "apertus-micro.yaml"


def settings(**keys):
    given = {"max_steps": 40, "global_batch_size": 8, "sequence_length": 64, "learning_rate": 1e-3, **keys}
    return Settings.model_validate(given)


def adamw(weights, gradients, rate, chosen, decay):
    """Algorithm 2 of arXiv 1711.05101."""
    first = second = 0.0
    for t, gradient in enumerate(gradients, 1):
        first = chosen.adam_beta1 * first + (1 - chosen.adam_beta1) * gradient
        second = chosen.adam_beta2 * second + (1 - chosen.adam_beta2) * gradient**2
        mean, square = first / (1 - chosen.adam_beta1**t), second / (1 - chosen.adam_beta2**t)
        weights = weights - rate(t) * (mean / (np.sqrt(square) + 1e-8) + decay * weights)
    return weights


def ademamix(weights, gradients, rate, chosen, decay):
    """Algorithm 1 of arXiv 2409.03137, with its schedules of alpha and beta3."""
    fast = slow = square = 0.0
    beta1, beta2, beta3 = chosen.adam_beta1, chosen.adam_beta2, chosen.ademamix_beta3
    warmup = chosen.max_steps if chosen.ademamix_warmup_steps is None else chosen.ademamix_warmup_steps
    for t, gradient in enumerate(gradients, 1):
        share = min(t / warmup, 1.0) if warmup else 1.0
        alpha = share * chosen.ademamix_alpha
        below = (1 - share) * math.log(beta3) + share * math.log(beta1)
        beta = min(math.exp(math.log(beta1) * math.log(beta3) / below), beta3)
        fast = beta1 * fast + (1 - beta1) * gradient
        slow = beta * slow + (1 - beta) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        update = (fast / (1 - beta1**t) + alpha * slow) / (np.sqrt(square / (1 - beta2**t)) + 1e-8)
        weights = weights - rate(t) * (update + decay * weights)
    return weights


@pytest.mark.parametrize(
    ("keys", "reference"),
    [
        ({"optimizer": "adamw"}, adamw),
        ({"optimizer": "ademamix"}, ademamix),
        ({"optimizer": "ademamix", "ademamix_warmup_steps": 10, "ademamix_beta3": 0.99}, ademamix),
        ({"optimizer": "ademamix", "ademamix_warmup_steps": 0, "ademamix_alpha": 2.0}, ademamix),
    ],
)
def test_an_optimizer_is_its_papers_algorithm_in_float64(keys, reference):
    rng, chosen = np.random.default_rng(0), settings(weight_decay=0.3, **keys)
    layer = nn.Linear(7, 5).double()
    begun = {name: weights.detach().numpy().copy() for name, weights in layer.named_parameters()}
    gradients = {name: rng.normal(size=(25, *weights.shape)) for name, weights in begun.items()}
    optimizer = getattr(optimizers, chosen.optimizer)(layer, chosen)
    for step in range(25):
        for name, weights in layer.named_parameters():
            weights.grad = torch.from_numpy(gradients[name][step])
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        optimizer.step()
    for name, decay in (("weight", 0.3), ("bias", 0.0)):  # only matrices decay
        expected = reference(begun[name], gradients[name], lambda t: 1e-3 * t, chosen, decay)
        assert np.abs(layer.get_parameter(name).detach().numpy() - expected).max() < 1e-13


def test_a_slow_mean_may_begin_without_any_memory():
    chosen = settings(optimizer="ademamix", adam_beta1=0.0)
    layer = nn.Linear(3, 2)
    optimizer = optimizers.ademamix(layer, chosen)
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    beta3 = 0.9999**40  # a half-life of a fortieth
    assert torch.allclose(state["exp_avg_slow"], (1 - beta3) * layer.weight.grad)


def test_the_rate_is_zero_until_it_is_set():
    for optimizer in ("adamw", "ademamix"):
        layer = nn.Linear(3, 2)
        before = layer.weight.detach().clone()
        chosen = getattr(optimizers, optimizer)(layer, settings(optimizer=optimizer))
        layer(torch.ones(3)).sum().backward()
        chosen.step()
        assert layer.weight.equal(before)


@pytest.mark.parametrize("optimizer", ["adamw", "ademamix"])
def test_only_matrices_decay(make_tokens, optimizer):
    model = build(MICRO, make_tokens("tokens", [20]), 64, seed=0)
    decaying, others = getattr(optimizers, optimizer)(model, settings(optimizer=optimizer)).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {weights: name for name, weights in model.named_parameters()}
    assert {names[weights].rpartition(".")[2] for weights in decaying["params"]} == {"weight"}
    assert all("norm" in names[weights] or "alpha" in names[weights] for weights in others["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(names)


def sharded_process(rank, folder):
    """Train in two shards, from a point that one process saved."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, optimizer = made(9)
    fully_shard(model)
    optimizer = optimizers.ademamix(model, settings(optimizer="ademamix"))
    resume.restore(resume.newest(folder / "resume")[0], model, optimizer)
    take_step(model, optimizer, 2)
    weights = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    if rank == 0:
        torch.save(weights, folder / "sharded.pt")
    distributed.destroy_process_group()


def made(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    return model, optimizers.ademamix(model, settings(optimizer="ademamix"))


def take_step(model, optimizer, seed):
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    model(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_ademamix_trains_in_shards_what_one_process_trains_and_goes_on_from_its_state(tmp_path):
    model, optimizer = made(0)
    take_step(model, optimizer, 1)
    with resume.Saver(Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl"), model, optimizer) as saver:
        saver.save({"step": 1})
    take_step(model, optimizer, 2)
    multiprocessing.spawn(sharded_process, (tmp_path,), nprocs=2)
    sharded = torch.load(tmp_path / "sharded.pt")
    for name, weights in model.state_dict().items():
        assert torch.allclose(weights, sharded[name], atol=1e-6), name
