import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from cordee.compute.logprobs import MERGE_LIMIT, Difference
from cordee.compute.model import open_model, stop_token_ids
from cordee.compute.tokenizer import open_tokenizer
from cordee.cost import Cost
from cordee.errors import Fault, UserError
from cordee.stage import Context
from posttrain import merge
from posttrain.training import adapter_settings, adapters


@pytest.fixture
def base(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "sft@1")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    chats = [
        [{"role": "user", "content": "Which language? " * (1 + n)}, {"role": "assistant", "content": "Romansh"}]
        for n in range(5)
    ]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return file


@pytest.fixture
def merged(base: Path, prompts: Path, context: Context) -> Callable[..., dict[str, Any]]:
    """Merges an adapter whose `B` matrices are random of a given size; returns the stage's metrics."""

    def call(size: float = 0.2, lora: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
        folder = base.parent / "dpo@1"
        torch.manual_seed(1)
        model = open_model(base)
        adapted = get_peft_model(model, adapter_settings.lora_config({"r": 4, **(lora or {})}, model))
        generator = torch.Generator().manual_seed(2)
        for name, weights in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weights.data = weights.data + torch.randn(weights.shape, generator=generator).to(weights.dtype) * size
        adapters.save(adapted, folder, base=base)
        values = {"adapter": str(folder), "model": str(base), "prompts": str(prompts), "rows": 4, **keys}
        return merge.run(merge.Config.model_validate(values), context)

    return call


def test_an_adapters_own_chat_template_is_what_it_was_trained_with(
    merged: Callable[..., dict[str, Any]], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in `tokenizer_config.json`, where transformers 4 wrote it."""
    save, template = adapters.save, "{% for m in messages %}{{ m.content }}{% endfor %}"

    def planted(model: Any, folder: Path, **rest: Any) -> None:
        save(model, folder, **rest)
        (folder / "chat_template.jinja").unlink()
        named = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**named, "chat_template": template}))

    monkeypatch.setattr(adapters, "save", planted)
    merged()
    assert open_tokenizer(context.out).chat_template == template
    assert "trained with another tokenizer" in context.events.read_text()
    assert "its chat_template" in context.events.read_text()


def test_a_merged_model_stops_where_its_base_does(
    merged: Callable[..., dict[str, Any]], base: Path, context: Context
) -> None:
    """As the maker has it: a lone number, which is not the tokenizer's eos, and fields beside it."""
    stop = open_tokenizer(base).convert_tokens_to_ids("<|assistant_end|>")
    settings = {"eos_token_id": stop, "temperature": 0.6, "top_p": 0.9, "stop_strings": ["###"]}
    (base / "generation_config.json").write_text(json.dumps(settings))
    merged()
    assert json.loads((context.out / "generation_config.json").read_text()) == settings
    assert stop_token_ids(context.out) == [stop]


def test_a_merged_model_is_the_base_with_its_adapter(
    merged: Callable[..., dict[str, Any]], base: Path, context: Context
) -> None:
    metrics = merged()
    assert metrics["adapter_effect_nats"] > 0.05
    assert metrics["merged_max_abs_delta_logprob"] < 1e-4
    assert metrics["saved_max_abs_delta_logprob"] < 1e-4
    assert metrics["saved_top1_agreement"] == 1.0
    assert metrics["rows"] == 4
    before, after = load_file(base / "model.safetensors"), load_file(context.out / "model.safetensors")
    assert set(before) == set(after)
    assert metrics["parameters"] == sum(p.numel() for p in open_model(base).parameters())
    delta = load_file(base.parent / "dpo@1" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    up, down = (delta[f"base_model.model.{name}.lora_{side}.weight"].double() for side in ("B", "A"))
    expected = before[f"{name}.weight"].double() + 8 / 4 * up @ down  # alpha / r, PEFT's default alpha being 8
    torch.testing.assert_close(after[f"{name}.weight"].double(), expected, atol=1e-6, rtol=0)
    assert (context.out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_tokenizer_needs_no_padding_token(merged: Callable[..., dict[str, Any]], base: Path) -> None:
    """Those of Llama 3, Mistral and GPT-2 have none; the chats are of unequal lengths."""
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_tokenizer(base).pad_token_id is None
    assert merged()["saved_max_abs_delta_logprob"] < 1e-4


def test_saved_modules_are_merged_too(merged: Callable[..., dict[str, Any]], base: Path, context: Context) -> None:
    metrics = merged(lora={"modules_to_save": ["lm_head"]})
    assert metrics["saved_max_abs_delta_logprob"] < 1e-4
    before, after = load_file(base / "model.safetensors"), load_file(context.out / "model.safetensors")
    assert not before["lm_head.weight"].equal(after["lm_head.weight"])


def test_a_bfloat16_base_stays_bfloat16_and_its_rounding_is_measured(
    merged: Callable[..., dict[str, Any]], base: Path, context: Context
) -> None:
    open_model(base).to(torch.bfloat16).save_pretrained(base)
    metrics = merged()
    assert metrics["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(context.out / "model.safetensors").values()} == {torch.bfloat16}
    assert metrics["merged_max_abs_delta_logprob"] < 1e-4 < metrics["saved_max_abs_delta_logprob"] < 0.2


def test_one_improbable_token_does_not_decide_on_a_rounded_merge() -> None:
    found = Difference(largest=4.8, mean=0.05, top1=0.98)
    assert (found.merged("bfloat16"), found.merged("float32")) == (0.05, 4.8)
    assert found.merged("bfloat16") < MERGE_LIMIT["bfloat16"]


def test_a_difference_over_the_tolerance_is_a_fault(merged: Callable[..., dict[str, Any]], base: Path) -> None:
    open_model(base).to(torch.bfloat16).save_pretrained(base)
    with pytest.raises(Fault, match=r"saved and opened again, it differs .* more than 1e-05"):
        merged(tolerance=1e-5)


def test_a_merge_that_loses_the_adapter_is_a_fault(
    merged: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    def without_it(model: PeftModel, **_: Any) -> Any:
        return model.unload()

    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_and_unload", without_it)
    with pytest.raises(Fault, match="merged in memory, it differs"):
        merged()


def test_an_adapter_without_effect_is_said(merged: Callable[..., dict[str, Any]], context: Context) -> None:
    assert merged(size=0.0)["adapter_effect_nats"] == 0
    assert "has no effect" in context.events.read_text()


def test_an_adapter_of_another_tokenizer_is_refused(
    merged: Callable[..., dict[str, Any]], base: Path, context: Context
) -> None:
    merged()
    folder = base.parent / "dpo@1"
    told = json.loads((folder / "tokenizer.json").read_text())
    told["model"]["merges"] = told["model"]["merges"][:20]
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="adapter: encodes differently from"):
        merge.run(merge.Config.model_validate({"adapter": str(folder)}), context)


def test_a_tokenizer_that_was_saved_again_is_the_same(
    merged: Callable[..., dict[str, Any]], base: Path, context: Context
) -> None:
    """Its bytes differ, and it encodes alike: the base's files are kept."""
    merged()
    folder = base.parent / "dpo@1"
    open_tokenizer(folder).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads((folder / "tokenizer.json").read_text())))
    assert (folder / "tokenizer.json").read_bytes() != (base / "tokenizer.json").read_bytes()
    merge.run(merge.Config.model_validate({"adapter": str(folder)}), context)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (context.out / name).read_bytes() == (base / name).read_bytes()


def test_prompts_without_conversations_are_refused(merged: Callable[..., dict[str, Any]], prompts: Path) -> None:
    prompts.write_text('{"text": "no chat"}\n')
    with pytest.raises(UserError, match="row 1: is a text, and a chat is needed"):
        merged()


def test_merging_again_over_what_a_kill_left_gives_the_same_files(
    merged: Callable[..., dict[str, Any]], context: Context
) -> None:
    merged()
    whole = {path.name: path.read_bytes() for path in context.out.iterdir()}
    (context.out / "config.json").unlink()
    (context.out / ".saving").mkdir()
    (context.out / ".saving" / "model.safetensors").write_bytes(b"half")
    merged()
    assert {path.name: path.read_bytes() for path in context.out.iterdir()} == whole


def test_the_cost_is_four_passes_over_the_prompts() -> None:
    config = merge.Config.model_validate({"adapter": "$dpo", "model": "$sft", "prompts": "$chats/x", "rows": 10})
    cost = merge.cost(config, {"model": Cost(parameters=1e6)})
    assert cost.flops == 2.0 * 1e6 * cost.tokens
    assert cost.tokens == 4 * 10 * 1024
