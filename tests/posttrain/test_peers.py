"""Adapters and models as PEFT, TRL and transformers write them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import chats, make, sft_keys
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cordee import files, model_folder
from cordee.compute.model import open_model, save_model, tables_are_one
from cordee.errors import UserError
from cordee.stage import Context
from posttrain import merge, sft
from posttrain.training import skeleton
from posttrain.training.cost import training_cost

NewContext = Callable[[str], Context]
IDS = torch.tensor([list(range(60, 90))])


def said(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def with_effect(model: PeftModel) -> PeftModel:
    """Give every trained weight of an adapter some other value."""
    generator = torch.Generator().manual_seed(1)
    for weights in model.parameters():
        if weights.requires_grad:
            weights.data += torch.randn(weights.shape, generator=generator) * 0.3
    return model


def adapter(base: Path, folder: Path, rows: int = 0, **lora: Any) -> torch.Tensor:
    """Write an adapter as PEFT does; returns what it says."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows)
    given = {"r": 2, "target_modules": ["q_proj", "v_proj"], **lora}
    made = with_effect(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given)))
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return said(made)


PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "dora": ("llama", {"use_dora": True}),
    "rslora": ("llama", {"use_rslora": True, "lora_alpha": 5}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "trained tokens": ("llama", {"trainable_token_indices": [3, 7]}),
    "trained tokens of tied tables": ("llama_tied", {"trainable_token_indices": [3, 7]}),
    "stored embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "grown embeddings": ("llama", {"rows": 400, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved head": ("llama", {"modules_to_save": ["lm_head"]}),
    "lora over the head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "lora over a tied head": ("llama_tied", {"target_modules": ["lm_head", "q_proj"]}),
    "lora over a tied embedding": ("llama_tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "saved tied embedding": ("llama_tied", {"modules_to_save": ["embed_tokens"]}),
    "both tied tables as one": ("llama_tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "lora over both tied tables": (
        "llama_tied",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "one of two tied tables of GPT-2": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
}
PARTED = {
    "lora over a tied head",
    "lora over a tied embedding",
    "saved tied embedding",
    "one of two tied tables of GPT-2",
}


@pytest.mark.parametrize("name", PEERS)
def test_an_adapter_of_a_peer_is_merged_without_a_word_more(tmp_path: Path, new_context: NewContext, name: str) -> None:
    """What PEFT says of it unmerged is what the merged folder says, opened by transformers alone."""
    architecture, keys = PEERS[name]
    base = make(tmp_path / "base", architecture)
    expected = adapter(base, tmp_path / "adapter", **keys)
    context = new_context("merged")
    metrics = merge.run(merge.Config.model_validate({"adapter": str(tmp_path / "adapter")}), context)
    assert metrics["adapter_effect_nats"] > 1e-2
    again = AutoModelForCausalLM.from_pretrained(context.out, dtype=torch.float32)
    torch.testing.assert_close(said(again), expected, atol=1e-4, rtol=0)
    was_tied = architecture in ("llama_tied", "gpt2")
    assert tables_are_one(again) == again.config.tie_word_embeddings == (was_tied and name not in PARTED)
    assert ("merged, they are two" in context.events.read_text()) == (name in PARTED)


@pytest.mark.parametrize("name", ["plain", "dora", "trained tokens", "saved head", "stored embeddings"])
def test_an_adapter_of_a_peer_is_trained_on(tmp_path: Path, new_context: NewContext, name: str) -> None:
    architecture, keys = PEERS[name]
    base = make(tmp_path / "base", architecture)
    expected = adapter(base, tmp_path / "adapter", **keys)
    config = sft.Config.model_validate(sft_keys(tmp_path / "adapter", chats(tmp_path)))
    torch.testing.assert_close(said(skeleton.open_model(config)[0]), expected, atol=1e-5, rtol=0)
    context = new_context("second")
    assert sft.run(config, context)["steps"] == 2
    again = merge.run(merge.Config.model_validate({"adapter": str(context.out)}), new_context("merged"))
    assert again["adapter_effect_nats"] > 1e-2


def test_lora_over_the_head_is_not_trained(tmp_path: Path, new_context: NewContext) -> None:
    """TRL's loss reads the head's own weights, and TRL says so."""
    base = make(tmp_path / "base", "llama")
    adapter(base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    for model, lora in ((tmp_path / "adapter", None), (base, {"target_modules": ["lm_head"]})):
        config = sft.Config.model_validate(sft_keys(model, chats(tmp_path), lora=lora))
        with pytest.raises(UserError, match="to `lm_head` is not supported"):
            sft.run(config, new_context("second"))


# Models


def sharded(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="20KB")
    assert (base / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_model_in_shards_is_trained(tmp_path: Path, new_context: NewContext, lora: dict[str, Any] | None) -> None:
    base = make(tmp_path / "base", "llama_tied")
    expected = said(open_model(base))
    sharded(base)
    assert said(open_model(base)).equal(expected)
    sft.run(sft.Config.model_validate(sft_keys(base, chats(tmp_path), lora=lora)), new_context("sft"))


@pytest.mark.parametrize("is_adapter", [False, True])
def test_the_output_of_a_trainer_is_opened_at_a_checkpoint(tmp_path: Path, *, is_adapter: bool) -> None:
    base = make(tmp_path / "base", "llama")
    for step in (500, 900, 1000):
        if is_adapter:
            adapter(base, tmp_path / "out" / f"checkpoint-{step}")
        else:
            shutil.copytree(base, tmp_path / "out" / f"checkpoint-{step}")
        (tmp_path / "out" / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
        (tmp_path / "out" / f"checkpoint-{step}" / "training_args.bin").write_bytes(b"")
    keys = sft_keys(tmp_path / "out", tmp_path / "chats.jsonl")
    with pytest.raises(UserError, match=r"model: is no Hugging Face model.* did you mean out/checkpoint-1000\?"):
        skeleton.open_model(sft.Config.model_validate(keys))
    keys |= {"model": str(tmp_path / "out" / "checkpoint-1000")}
    skeleton.open_model(sft.Config.model_validate(keys))


def test_two_tables_are_published_as_two(tmp_path: Path) -> None:
    """Though the config says that they are one, as transformers itself opens it."""
    base = make(tmp_path / "base", "llama_tied")
    model = open_model(base)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    expected = said(model)
    save_model(model, tmp_path / "published", tokenizer=base)
    assert files.read_json(tmp_path / "published" / "config.json")["tie_word_embeddings"] is False
    assert said(open_model(tmp_path / "published")).equal(expected)


# What a plan says


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"n_layer": 2, "n_embd": 16, "n_positions": 256, "vocab_size": 9}, (2, 16, 256, 9)),
        ({"text_config": {"num_hidden_layers": 3, "hidden_size": 8, "max_position_embeddings": 64}}, (3, 8, 64, None)),
        ({"vision_config": {"hidden_size": 5}, "llm_config": {"hidden_size": 6, "vocab_size": 7}}, (None, 6, None, 7)),
    ],
)
def test_a_shape_is_read_from_any_config(config: dict[str, Any], shape: tuple[int | None, ...]) -> None:
    found = model_folder.shape(config)
    assert (found.layers, found.width, found.positions, found.vocab_size) == shape


def test_the_cost_of_an_adapter_is_that_of_its_base(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "llama")
    adapter(base, tmp_path / "adapter")
    costs = []
    for keys in ({"model": str(tmp_path / "adapter")}, {"model": str(base), "lora": {"r": 2}}):
        config = sft.Config.model_validate(sft_keys(base, tmp_path) | keys)
        costs.append(training_cost(config, {}, 1000.0))
    own, new = (replace(cost, memory=None, memory_bytes=None) for cost in costs)  # they change other matrices
    assert own == new
    assert costs[0].parameters == sum(weights.numel() for weights in open_model(base).parameters())
    merged = merge.Config.model_validate({"adapter": str(tmp_path / "adapter")})
    assert merge.cost(merged, {}).parameters == costs[0].parameters


def test_the_weights_of_its_base_are_part_of_what_an_adapter_is(tmp_path: Path) -> None:
    from cordee import hashes
    from cordee.model_folder import ModelInput

    base = make(tmp_path / "base", "llama")
    adapter(base, tmp_path / "adapter")
    before = hashes.of_content(ModelInput(tmp_path / "adapter"))
    settings_ = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings_ | {"rms_norm_eps": 0.5}))
    assert hashes.of_content(ModelInput(tmp_path / "adapter")) != before
