"""GRPO with completions by a real vLLM, which holds the weights that are trained."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_samples import config, keys, lines, prompts, rloo_config, served

from cordee.errors import Fault, Stopped
from cordee.stage import Context
from posttrain import grpo, rloo

pytest.importorskip("vllm", reason="vLLM is not installed on this platform")
ROOT = Path(__file__).parents[2]
STEPS = {"max_steps": 4, "learning_rate": 2e-2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, template: str) -> Path:
    """A model that vLLM serves."""
    return served(tmp_path_factory.mktemp("served"), template)


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Any]:
    """One vLLM for all tests here."""
    from cordee.compute.model import open_model
    from posttrain.rollouts.with_vllm import Vllm, VllmArguments, config_json

    opened = open_model(model)
    vllm = Vllm(VllmArguments(config_json(opened.config, type(opened).__name__), "float32", 200, (1, 8), 0.3))
    yield vllm
    vllm.close()


@pytest.fixture
def engine(running: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The running vLLM takes the place of one that a training starts."""
    from posttrain.rollouts import samplers

    def take(start: Any) -> Any:
        running.start, running.is_filled = start, False
        return running

    monkeypatch.setattr(samplers, "Vllm", take)
    monkeypatch.setattr(running, "close", lambda: None)
    return running


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """A file of prompts, of which one is longer than vLLM reads at once with the others."""
    file = prompts(tmp_path / "prompts.jsonl")
    with file.open("a", encoding="utf-8") as more:
        more.write(json.dumps({"prompt": "Why? " * 30, "answer": "#### 1"}) + "\n")
    return file


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("lora", [{"r": 4, "lora_alpha": 8}, None])
def test_it_samples_from_the_weights_of_each_step(
    model: Path, asked: Path, new_context: Callable[[str], Context], lora: Any
) -> None:
    """By the same seeds transformers samples the same completions of the same weights."""
    own, other = new_context("vllm"), new_context("transformers")
    grpo.run(config(model, asked, engine="vllm", lora=lora, trainer=STEPS, heldout=0.2), own)
    grpo.run(config(model, asked, lora=lora, trainer=STEPS, heldout=0.2), other)
    rows = [row for row in lines(own) if "loss" in row]
    assert all(0 < row["logprob_mismatch/mean"] < 1e-3 for row in rows)
    one, two = (lines(context, "completions.jsonl") for context in (own, other))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    first = [(a["completion"], b["completion"]) for a, b in zip(one, two, strict=True) if a["step"] <= 1]
    assert sum(a == b for a, b in first) / len(first) > 0.8  # rounding moves a draw now and then


@pytest.mark.usefixtures("engine")
def test_weights_that_were_not_renewed_are_a_fault(
    model: Path, asked: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.rollouts.samplers import Colocated

    sync, calls = Colocated.sync, []

    def once(self: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            sync(self)

    monkeypatch.setattr(Colocated, "sync", once)
    keys = config(model, asked, engine="vllm", lora=None, trainer=STEPS)
    with pytest.raises(Fault, match=r"max_logprob_mismatch: .*engine: transformers"):
        grpo.run(keys, context)
    assert len(lines(context)) >= 1


@pytest.mark.usefixtures("engine")
def test_a_weight_that_vllm_was_not_given_is_a_fault(
    model: Path, asked: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.rollouts import weights

    named = weights.named

    def without(*given: Any, **how: Any) -> Any:
        return (one for one in named(*given, **how) if "layers.1.mlp.up_proj" not in one[0])

    monkeypatch.setattr(weights, "named", without)
    with pytest.raises(Fault, match=r"was not given 1 of its weights, model\.layers\.1\.mlp\.up_proj\.weight first"):
        grpo.run(config(model, asked, engine="vllm"), context)


@pytest.mark.usefixtures("engine")
def test_a_stopped_run_goes_on_to_the_same_bits(
    model: Path, asked: Path, new_context: Callable[[str], Context]
) -> None:
    class StopsAfterTwo(Context):
        calls = 0

        def stop_requested(self) -> bool:
            StopsAfterTwo.calls += 1
            return StopsAfterTwo.calls >= 2

    whole, broken = new_context("whole"), new_context("broken")
    asked_of = config(model, asked, engine="vllm", trainer={**STEPS, "num_iterations": 2})
    grpo.run(asked_of, whole)
    with pytest.raises(Stopped, match="step 2 of 4"):
        grpo.run(asked_of, StopsAfterTwo(broken.out, broken.seed, broken.events))
    grpo.run(asked_of, broken)
    assert lines(whole) == lines(broken)
    assert lines(whole, "completions.jsonl") == lines(broken, "completions.jsonl")
    name = "adapter_model.safetensors"
    assert (whole.out / name).read_bytes() == (broken.out / name).read_bytes()


@pytest.mark.usefixtures("engine")
def test_rloo_samples_by_it_as_well(model: Path, asked: Path, context: Context) -> None:
    rloo.run(rloo_config(model, asked, engine="vllm", trainer=STEPS), context)
    assert all(row["logprob_mismatch/mean"] < 1e-3 for row in lines(context))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("trainer", [{"temperature": 0.7}, {"vllm_importance_sampling_correction": False}])
def test_it_agrees_at_other_temperatures_and_without_correction(
    model: Path, asked: Path, context: Context, trainer: dict[str, Any]
) -> None:
    grpo.run(config(model, asked, engine="vllm", trainer={**STEPS, **trainer}), context)
    assert all(row["logprob_mismatch/mean"] < 1e-3 for row in lines(context))


def test_the_trainers_random_numbers_and_matrices_are_left_alone(engine: Any) -> None:
    from vllm.model_executor.layers.linear import LinearBase

    from posttrain.training.sampling import SamplingSettings

    before = torch.random.get_rng_state()
    engine.sample([[5, 6, 7]], [1], SamplingSettings(1.0, 8))
    assert torch.random.get_rng_state().equal(before)
    assert not hasattr(LinearBase, "_cpu_skip_gemm_dispatch")
    assert torch.is_grad_enabled()


def command(place: Path, name: str, values: dict[str, Any]) -> list[str]:
    """Starts the stage as a person does."""
    file = place / f"{name}.yaml"
    file.write_text(json.dumps(values))
    return [sys.executable, "-m", "posttrain.grpo", "--config", str(file), "--runs", str(place / f"runs-{name}")]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.long
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_killed_command_goes_on_to_the_same_bits(model: Path, asked: Path, tmp_path: Path, mode: str) -> None:
    values = keys(model, asked, engine="vllm", vllm_mode=mode, trainer={"max_steps": 8})
    subprocess.run(command(tmp_path, "whole", values), env=environment(), check=True, timeout=600)
    start = command(tmp_path, "broken", values)
    broken = subprocess.Popen(start, env=environment(), start_new_session=True)
    until = time.monotonic() + 400
    whole, again = (tmp_path / f"runs-{name}" / name / "grpo@1" for name in ("whole", "broken"))
    kept = again.with_name("grpo@1.partial") / "completions.jsonl"
    while not (kept.exists() and '"step": 6' in kept.read_text()) and time.monotonic() < until:
        assert broken.poll() is None
        time.sleep(0.05)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.wait()
    assert not again.exists()
    subprocess.run(start, env=environment(), check=True, timeout=600)
    for name in ("adapter_model.safetensors", "completions.jsonl"):
        assert (whole / name).read_bytes() == (again / name).read_bytes(), name
