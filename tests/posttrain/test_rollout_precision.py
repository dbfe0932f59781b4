"""What online RL computes in, and what it has in memory: the same for trainer, vLLM, limits and plan."""

from pathlib import Path
from typing import Any

import pytest
from rollout_samples import config, prompts, rloo_config
from trl import GRPOConfig

from cordee.memory import BYTES
from cordee.stage import Context
from posttrain import grpo, rloo
from posttrain.rollouts import build
from posttrain.training import skeleton


def test_the_memory_has_the_reference_vllms_copy_and_reward_models(model_folder: Path, tmp_path: Path) -> None:
    """The reference is as the model is opened, vLLM's copy as it computes, a reward model as it is stored."""
    asked, judge = prompts(tmp_path / "prompts.jsonl"), str(model_folder)

    def frozen(stage: Any = grpo, *, lora: Any = None, **changes: Any) -> float:
        keys = (config if stage is grpo else rloo_config)(model_folder, asked, lora=lora, **changes)
        cost = stage.cost(keys, {})
        assert cost.memory_bytes == cost.memory.total
        return cost.memory.frozen / cost.parameters

    assert frozen() == 0  # GRPO has no reference unless told
    assert frozen(trainer={"beta": 0.04}) == frozen(rloo) == 4
    assert frozen(rloo, trainer={"model_init_kwargs": {"dtype": "bfloat16"}}) == 2
    assert frozen(rloo, lora={"r": 4}) == 0  # it is the base
    assert frozen(engine="vllm") == 4
    assert frozen(engine="vllm", trainer={"bf16": True}) == 2
    assert frozen(engine="vllm", vllm_mode="server") == 0
    assert frozen(rloo, engine="vllm") == 8
    stored = (model_folder / "model.safetensors").stat().st_size
    parameters = grpo.cost(config(model_folder, asked), {}).parameters
    assert frozen(rewards=[{"model": judge}]) == pytest.approx(stored / parameters)


@pytest.mark.parametrize(
    ("trainer", "precision", "wanted"),
    [
        ({}, "float32", "float32"), ({}, "bfloat16", "bfloat16"), ({"bf16": None}, "float32", "float32"),
        ({"bf16": False}, "bfloat16", "float32"), ({"bf16": True}, "float32", "bfloat16"),
        ({"fp16": True}, "bfloat16", "float16"), ({"fp16": False}, "bfloat16", "bfloat16"),
    ],
)  # fmt: skip
def test_what_is_computed_in_is_what_the_trainer_is_told(
    model_folder: Path, tmp_path: Path, context: Context, trainer: dict[str, Any], precision: str, wanted: str
) -> None:
    keys = config(model_folder, prompts(tmp_path / "p.jsonl"), precision=precision)
    own = {name: value for name, value in keys.trainer.items() if name != "bf16"}
    keys = keys.model_copy(update={"trainer": own | trainer})
    assert keys.computes_in == wanted
    assert set(build.MISMATCH) == set(build.START_TOLERANCE) == set(BYTES)
    cost = grpo.cost(keys, {})
    assert cost.memory.casts == (0 if wanted == "float32" else 2 * cost.decoder.in_matrices)
    if wanted != "float16":  # of which there is none on a CPU
        made = skeleton.arguments(GRPOConfig, keys, context)
        assert (made.bf16, made.fp16) == (wanted == "bfloat16", False)


@pytest.mark.parametrize(
    ("told", "limit", "start"), [({"bf16": False}, 0.01, 1e-3), ({"bf16": True}, 0.1, 0.05)]
)  # fmt: skip
def test_vllm_and_the_limits_are_of_what_the_trainer_computes_in(
    model_folder: Path, tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch,
    told: dict[str, bool], limit: float, start: float,
) -> None:  # fmt: skip
    """`precision` says the opposite."""
    precision = "bfloat16" if limit == 0.01 else "float32"
    trainer = {**told, "beta": 0.04}
    keys = config(model_folder, prompts(tmp_path / "p.jsonl"), precision=precision, trainer=trainer)
    opened, _ = grpo.build(keys, context)
    assert opened.mismatch.limit == limit
    assert ("float32 rounds less" in opened.mismatch.advice) == told["bf16"]
    found = [one for one in opened.callback_handler.callbacks if isinstance(one, build.StartsAtReference)]
    assert [one.expected["kl"] for one in found] == [(0.0, start)]
    monkeypatch.setattr(build, "Colocated", lambda _trainer, given: given)  # what vLLM would be started with
    vllm = keys.model_copy(update={"engine": "vllm"})
    started: Any = build._sampler(opened, vllm, [1], 32, context)
    assert started.dtype == ("bfloat16" if told["bf16"] else "float32")
