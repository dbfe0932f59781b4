"""Several adapters by weight and averages of models: against arithmetic in float64, and with planted faults."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from cordee.compute.model import open_model
from cordee.cost import Cost
from cordee.errors import Fault, UserError
from cordee.stage import Context
from posttrain import merge
from posttrain.merging import averaging
from posttrain.training import adapter_settings, adapters

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "sft@1")


@pytest.fixture
def adapter(base: Path) -> Callable[..., Path]:
    """Writes an adapter of random matrices."""

    def call(name: str, seed: int, **lora: Any) -> Path:
        torch.manual_seed(seed)
        model = open_model(base)
        adapted = get_peft_model(model, adapter_settings.lora_config({"r": 4, **lora}, model))
        generator = torch.Generator().manual_seed(seed)
        for place, weights in adapted.named_parameters():
            if "lora_B" in place or "modules_to_save" in place:
                weights.data = weights.data + torch.randn(weights.shape, generator=generator) * 0.2
        adapters.save(adapted, base.parent / name, base=base)
        return base.parent / name

    return call


def run(context: Context, **keys: Any) -> dict[str, Any]:
    return merge.run(merge.Config.model_validate(keys), context)


def product(folder: Path, name: str = NAME) -> torch.Tensor:
    """B A of an adapter, float64."""
    stored = load_file(folder / "adapter_model.safetensors")
    up, down = (stored[f"base_model.model.{name}.lora_{side}.weight"].double() for side in ("B", "A"))
    return up @ down


def weight(folder: Path, name: str = NAME) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[f"{name}.weight"].double()


def test_cat_is_the_weighted_sum_of_the_adapters(adapter: Any, base: Path, context: Context) -> None:
    """Ranks, scalings and rsLoRA may differ; the arithmetic is float64, from the files."""
    one, two = adapter("one@1", 1, lora_alpha=8), adapter("two@1", 2, r=8, lora_alpha=16, use_rslora=True)
    parts = [{"path": str(one), "weight": 0.7}, {"path": str(two), "weight": -0.4}]
    metrics = run(context, adapters=parts)
    expected = weight(base) + 0.7 * (8 / 4) * product(one) - 0.4 * (16 / 8**0.5) * product(two)
    torch.testing.assert_close(weight(context.out), expected, atol=2e-6, rtol=0)
    assert metrics["combination"] == "cat"
    assert metrics["adapters"] == 2
    assert metrics["sum_relative_error"] < 1e-6
    assert metrics["merged_max_abs_delta_logprob"] < 1e-4
    assert metrics["saved_max_abs_delta_logprob"] < 1e-4
    assert metrics["adapter_effect_nats"] > 0.05
    assert not (context.out / "adapter_config.json").exists()


def test_adapters_of_different_modules_and_layers_are_summed_where_they_are(
    adapter: Any, base: Path, context: Context
) -> None:
    one = adapter("one@1", 1, target_modules=["q_proj"], layers_to_transform=[0])
    two = adapter("two@1", 2, target_modules=["v_proj", "embed_tokens"])
    metrics = run(context, adapters=[{"path": str(one)}, {"path": str(two)}])
    assert metrics["sum_relative_error"] < 1e-6
    torch.testing.assert_close(weight(context.out), weight(base) + 2 * product(one), atol=2e-6, rtol=0)
    assert weight(context.out, "model.layers.1.self_attn.q_proj").equal(weight(base, "model.layers.1.self_attn.q_proj"))
    moved = weight(context.out, "model.layers.1.self_attn.v_proj") - weight(base, "model.layers.1.self_attn.v_proj")
    torch.testing.assert_close(moved, 2 * product(two, "model.layers.1.self_attn.v_proj"), atol=2e-6, rtol=0)


def test_svd_of_full_rank_is_the_sum_and_of_a_lower_one_is_not(adapter: Any, context: Context) -> None:
    parts = [{"path": str(adapter("one@1", 1))}, {"path": str(adapter("two@1", 2))}]
    whole = run(context, adapters=parts, combination="svd", rank=8)
    assert whole["sum_relative_error"] < 1e-5
    cut = run(context, adapters=parts, combination="svd")
    assert 0.1 < cut["sum_relative_error"] < 1
    assert "svd is" in context.events.read_text()


def test_linear_is_said_to_be_off_the_sum(adapter: Any, context: Context) -> None:
    """PEFT adds A and B apart: (A₁ + A₂)(B₁ + B₂) has the mixed terms too."""
    parts = [{"path": str(adapter("one@1", 1)), "weight": 0.5}, {"path": str(adapter("two@1", 2)), "weight": 0.5}]
    metrics = run(context, adapters=parts, combination="linear")
    assert metrics["sum_relative_error"] > 0.5
    assert "linear is" in context.events.read_text()
    assert "`cat` is that sum" in context.events.read_text()


LONG = ("ties_svd", "dare_ties", "dare_linear_svd", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd")


@pytest.mark.parametrize(
    "combination", ["ties", "dare_linear", *(pytest.param(one, marks=pytest.mark.long) for one in LONG)]
)
def test_pruned_combinations_are_merged_and_repeat(adapter: Any, context: Context, combination: str) -> None:
    parts = [{"path": str(adapter("one@1", 1))}, {"path": str(adapter("two@1", 2))}]
    metrics = run(context, adapters=parts, combination=combination, density=0.5)
    assert metrics["saved_max_abs_delta_logprob"] < 1e-4
    assert metrics["adapter_effect_nats"] > 0
    first = (context.out / "model.safetensors").read_bytes()
    torch.manual_seed(99)
    run(context, adapters=parts, combination=combination, density=0.5)
    assert (context.out / "model.safetensors").read_bytes() == first


def test_dares_draw_depends_on_the_recipes_seed(adapter: Any, context: Context, tmp_path: Path) -> None:
    parts = [{"path": str(adapter("one@1", 1))}, {"path": str(adapter("two@1", 2))}]
    run(context, adapters=parts, combination="dare_linear", density=0.5)
    (tmp_path / "other").mkdir()
    other = Context(out=tmp_path / "other", seed=context.seed + 1, events=context.events)
    run(other, adapters=parts, combination="dare_linear", density=0.5)
    assert not weight(context.out).equal(weight(other.out))


def test_a_sum_that_peft_gets_wrong_is_a_fault(adapter: Any, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraModel

    add = LoraModel.add_weighted_adapter

    def planted(model: Any, names: Any, weights: Any, *rest: Any, **given: Any) -> None:
        add(model, names, [2 * one for one in weights], *rest, **given)

    monkeypatch.setattr(LoraModel, "add_weighted_adapter", planted)
    parts = [{"path": str(adapter("one@1", 1))}, {"path": str(adapter("two@1", 2))}]
    with pytest.raises(Fault, match="PEFT's sum of the adapters is away"):
        run(context, adapters=parts)


def test_adapters_of_different_ranks_need_another_combination(adapter: Any, context: Context) -> None:
    parts = [{"path": str(adapter("one@1", 1))}, {"path": str(adapter("two@1", 2, r=8))}]
    with pytest.raises(UserError, match=r"combination: PEFT can't combine them.*same r value.*`combination: cat`"):
        run(context, adapters=parts, combination="ties", density=0.5)


@pytest.mark.parametrize(
    ("lora", "message"), [({"use_dora": True}, "sets use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")]
)
def test_adapters_that_are_more_than_two_matrices_are_refused(
    adapter: Any, context: Context, lora: dict[str, Any], message: str
) -> None:
    parts = [{"path": str(adapter("one@1", 1))}, {"path": str(adapter("two@1", 2, **lora))}]
    with pytest.raises(UserError, match=f"{message}.*PEFT combines no such adapter"):
        run(context, adapters=parts)


def test_adapters_of_two_bases_are_refused(adapter: Any, base: Path, context: Context) -> None:
    one = adapter("one@1", 1)
    other = shutil.copytree(base, base.parent / "other@1")
    stored = load_file(other / "model.safetensors")
    stored["lm_head.weight"] += 1
    save_file(stored, other / "model.safetensors", metadata={"format": "pt"})
    two = shutil.copytree(adapter("two@1", 2), base.parent / "three@1")
    told = json.loads((two / "adapter_config.json").read_text())
    (two / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": "../other@1"}))
    with pytest.raises(UserError, match=r"three@1: adapters: was trained on \S+other@1, and \S+one@1 on \S+sft@1"):
        run(context, adapters=[{"path": str(one)}, {"path": str(two)}])
    with pytest.raises(UserError, match="is no adapter"):
        run(context, adapters=[{"path": str(one)}, {"path": str(base)}], model=str(base))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "adapter: nothing is given: what is merged is one of them"),
        ({"adapter": "a", "models": [{"path": "b"}, {"path": "c"}]}, "adapter and models are given"),
        ({"adapters": [{"path": "a"}]}, "adapters: holds one"),
        ({"adapters": [{"path": "a"}, {"path": "b"}], "combination": "ties"}, "density: ties needs it"),
        ({"adapters": [{"path": "a"}, {"path": "b"}], "density": 0.5}, "density: cat keeps all weights"),
        ({"adapters": [{"path": "a"}, {"path": "b"}], "rank": 5}, "rank: the rank that cat gives is not chosen"),
        ({"adapter": "a", "combination": "svd"}, "combination: is for several adapters"),
        ({"adapters": [{"path": "a"}, {"path": "b"}], "decay": 0.5}, "decay: is for models and checkpoints"),
        (
            {"models": [{"path": "a", "weight": 2}, {"path": "b"}], "decay": 0.5},
            "decay: gives the models their weights",
        ),
        ({"checkpoints": "a", "model": "b"}, "model: is the base of adapters"),
        ({"adapter": "a", "rows": 8}, "rows: is for `prompts`"),
    ],
)
def test_keys_that_do_not_fit_are_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        merge.Config.model_validate(keys)
    assert message in str(caught.value)


@pytest.fixture
def models(base: Path) -> list[Path]:
    """The base and two models of its shape."""
    found = [base]
    for number in (1, 2):
        folder = shutil.copytree(base, base.parent / f"model{number}@1")
        generator = torch.Generator().manual_seed(number)
        stored = {
            name: value + 0.05 * torch.randn(value.shape, generator=generator).to(value.dtype)
            for name, value in load_file(folder / "model.safetensors").items()
        }
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        found.append(folder)
    return found


def test_models_are_averaged_weight_by_weight(models: list[Path], context: Context) -> None:
    metrics = run(context, models=[{"path": str(path)} for path in models])
    torch.testing.assert_close(weight(context.out), sum(weight(path) for path in models) / 3, atol=1e-7, rtol=0)
    assert metrics["models"] == 3
    assert metrics["saved_max_abs_delta_logprob"] < 1e-4
    assert metrics["largest_rounding_ulp"] <= 1
    run(context, models=[{"path": str(path), "weight": share} for path, share in zip(models, (2, 1, 1), strict=True)])
    expected = 0.5 * weight(models[0]) + 0.25 * weight(models[1]) + 0.25 * weight(models[2])
    torch.testing.assert_close(weight(context.out), expected, atol=1e-7, rtol=0)


def test_the_average_of_equal_models_is_the_same_bits(base: Path, context: Context) -> None:
    run(context, models=[{"path": str(base)}, {"path": str(shutil.copytree(base, base.parent / "copy@1"))}])
    assert weight(context.out).equal(weight(base))


def test_a_moving_average_over_a_training_s_checkpoints(models: list[Path], context: Context) -> None:
    """By steps, not by names: 90 before 100; the artifact's own model is the last. θ̄ = d θ̄ + (1 - d) θ, by hand."""
    artifact = shutil.copytree(models[2], models[0].parent / "train@1")
    for step, model in ((90, models[0]), (100, models[1])):
        shutil.copytree(model, artifact / "checkpoints" / str(step))
    run(context, checkpoints=str(artifact), decay=0.8)
    average = weight(models[0])
    for path in models[1:]:
        average = 0.8 * average + 0.2 * weight(path)
    torch.testing.assert_close(weight(context.out), average, atol=1e-7, rtol=0)
    run(context, checkpoints=str(artifact))
    torch.testing.assert_close(weight(context.out), sum(map(weight, models)) / 3, atol=1e-7, rtol=0)
    with pytest.raises(UserError, match="checkpoints: has no checkpoints"):
        run(context, checkpoints=str(models[0]))


def test_shares_of_a_moving_average_add_up_to_one() -> None:
    found = averaging.shares([1.0] * 5, 0.9)
    assert sum(found) == pytest.approx(1, abs=1e-15)
    assert found[0] == pytest.approx(0.9**4)
    with pytest.raises(UserError, match="add up to 0"):
        averaging.shares([1.0, -1.0], None)


def test_bfloat16_models_are_averaged_in_float64_and_rounded_once(models: list[Path], context: Context) -> None:
    for path in models:
        stored = {name: value.to(torch.bfloat16) for name, value in load_file(path / "model.safetensors").items()}
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
        told = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**told, "dtype": "bfloat16"}))
    metrics = run(context, models=[{"path": str(path)} for path in models])
    assert metrics["dtype"] == "bfloat16"
    assert metrics["largest_rounding_ulp"] <= 1
    expected = sum(weight(path) for path in models) / 3
    assert (weight(context.out) - expected).abs().max() <= expected.abs().max() * 2**-8


def test_models_of_another_shape_config_or_vocabulary_are_refused(models: list[Path], context: Context) -> None:
    told = json.loads((models[1] / "config.json").read_text())
    (models[1] / "config.json").write_text(json.dumps({**told, "rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=r"model1@1: models: its config differs from that of \S+sft@1 in rms_norm_eps"):
        run(context, models=[{"path": str(path)} for path in models])
    (models[1] / "config.json").write_text(json.dumps(told))
    vocabulary = json.loads((models[1] / "tokenizer.json").read_text())
    vocabulary["model"]["merges"] = vocabulary["model"]["merges"][:20]
    (models[1] / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="encodes differently from"):
        run(context, models=[{"path": str(path)} for path in models])
    stored = {name: value.to(torch.float16) for name, value in load_file(models[2] / "model.safetensors").items()}
    save_file(stored, models[2] / "model.safetensors", metadata={"format": "pt"})
    (models[2] / "config.json").write_text(json.dumps({**told, "dtype": "float16"}))
    with pytest.raises(UserError, match="is not of the shape of"):
        run(context, models=[{"path": str(models[0])}, {"path": str(models[2])}])


def test_an_average_that_is_saved_wrong_is_a_fault(
    models: list[Path], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    average = averaging.average

    def planted(*given: Any) -> Any:
        model, expected, dtype = average(*given)
        expected["model.norm.weight"] = expected["model.norm.weight"] + 1e-3
        return model, expected, dtype

    monkeypatch.setattr(averaging, "average", planted)
    with pytest.raises(Fault, match=r"model\.norm\.weight is not the average"):
        run(context, models=[{"path": str(path)} for path in models])


def test_the_cost_of_an_average_is_two_passes() -> None:
    config = merge.Config.model_validate({"checkpoints": "$sft", "prompts": "$chats/x", "rows": 10})
    cost = merge.cost(config, {"checkpoints": Cost(parameters=1e6)})
    assert cost.tokens == 2 * 10 * 1024
    assert cost.memory_bytes > 12e6
    several = merge.Config.model_validate({"adapters": [{"path": "$a"}, {"path": "$b"}]})
    assert merge.cost(several, {"adapters.0.path": Cost(parameters=1e6)}).parameters == 1e6
