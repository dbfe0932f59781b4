"""Any causal language model: LoRA trained, merged, opened again; all three say the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, chats, make, sft_keys
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cordee import files
from cordee.compute import adapter
from cordee.compute.model import open_model
from cordee.errors import UserError
from cordee.model_folder import ADAPTER_WEIGHTS
from posttrain import merge, sft
from posttrain.training import adapter_settings

LIST = ["q_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS_OF = ["experts.down_proj", "experts.gate_up_proj"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_is_trained_merged_and_opened_again(name: str, tmp_path: Path, new_context: Any) -> None:
    base = make(tmp_path / "base", name)
    context = new_context("sft")
    metrics = sft.run(sft.Config.model_validate(sft_keys(base, chats(tmp_path), lora={"r": 2})), context)
    assert metrics["steps"] == 2
    merged = new_context("merged")
    given = {"adapter": str(context.out), "prompts": str(tmp_path / "chats.jsonl")}
    told = merge.run(merge.Config.model_validate(given), merged)
    assert told["adapter_effect_nats"] > 1e-3
    assert told["saved_max_abs_delta_logprob"] < 1e-3
    tokenizer = AutoTokenizer.from_pretrained(merged.out)
    ids = torch.tensor([tokenizer("All human beings are born free", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        opened = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        one = PeftModel.from_pretrained(opened, context.out).eval()(ids).logits
        two = AutoModelForCausalLM.from_pretrained(merged.out, dtype=torch.float32).eval()(ids).logits
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def adapter_of_transformers_4(folder: Path, base: Path, targets: list[str]) -> dict[str, torch.Tensor]:
    """Write an adapter under the names of the base's files; returns what it adds to their weights."""
    made, added = {}, {}
    torch.manual_seed(0)
    for name, weight in load_file(base / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in targets and "vision" not in name:
            up, down = 0.3 * torch.randn(weight.shape[0], 2), 0.3 * torch.randn(2, weight.shape[1])
            made |= {f"base_model.model.{layer}.lora_{side}.weight": part for side, part in (("A", down), ("B", up))}
            added[name] = 4 / 2 * up @ down
    folder.mkdir()
    save_file(made, folder / ADAPTER_WEIGHTS)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": targets}
    files.write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": str(base)})
    return added


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("qwen3_moe", LIST),  # a pair of matrices for each expert
        ("mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("gemma3_nested", ["gate_proj"]),  # `language_model.model.layers`
    ],
)
def test_an_adapter_of_transformers_4_is_merged_and_trained_on(
    name: str, targets: list[str], tmp_path: Path, new_context: Any
) -> None:
    base, old = make(tmp_path / "base", name), tmp_path / "old"
    added = adapter_of_transformers_4(old, base, targets)
    merged, trained, again = new_context("merged"), new_context("trained"), new_context("again")
    merge.run(merge.Config.model_validate({"adapter": str(old)}), merged)
    before, after = load_file(base / "model.safetensors"), load_file(merged.out / "model.safetensors")
    assert before.keys() == after.keys()
    for key, weight in before.items():
        torch.testing.assert_close(after[key], weight + added.get(key, 0), atol=1e-5, rtol=0)
    keys = sft_keys(old, chats(tmp_path), trainer={"learning_rate": 1e-12})
    sft.run(sft.Config.model_validate(keys), trained)
    merge.run(merge.Config.model_validate({"adapter": str(trained.out)}), again)
    for key, weight in load_file(again.out / "model.safetensors").items():
        torch.testing.assert_close(weight, after[key], atol=1e-5, rtol=0)
    keys |= {"adapter": "new", "lora": {"r": 2, "target_modules": ["q_proj"]}}
    if name == "gemma3_nested":
        summed = new_context("sum")
        sft.run(sft.Config.model_validate(keys), summed)
        merge.run(merge.Config.model_validate({"adapter": str(summed.out)}), again)
        for key, weight in load_file(again.out / "model.safetensors").items():
            torch.testing.assert_close(weight, after[key], atol=1e-5, rtol=0)
    else:
        with pytest.raises(UserError, match="sets target_parameters, and the sum of such an adapter"):
            sft.run(sft.Config.model_validate(keys), new_context("sum"))
    stored = load_file(old / ADAPTER_WEIGHTS)
    for lacking in (f"{targets[0]}.lora_B", next(key for key in stored if targets[-1] in key)):
        save_file({key: part for key, part in stored.items() if lacking not in key}, old / ADAPTER_WEIGHTS)
        with pytest.raises(UserError, match="does not fit"):
            adapter.open_served(old)


@pytest.mark.parametrize(
    ("name", "targets", "note"),
    [
        ("qwen3_moe", LIST, f"6 modules: {EXPERTS_OF[0]}, {EXPERTS_OF[1]}, q_proj; not covered: "),
        ("qwen3_moe", r".*\.experts\..*(gate|up)_proj", f"2 modules: {EXPERTS_OF[1]}; not covered: "),
        ("qwen2_moe", LIST, f"8 modules: {', '.join(sorted(LIST))}; not covered: {', '.join(EXPERTS_OF)}, "),
        ("llama", "all-linear", '14 modules: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"'),
    ],
)
def test_names_of_transformers_4_reach_the_experts_and_a_note_says_what_is_covered(
    name: str, targets: list[str] | str, note: str, tmp_path: Path, new_context: Any
) -> None:
    context = new_context("sft")
    keys = sft_keys(make(tmp_path / "base", name), chats(tmp_path), lora={"r": 2, "target_modules": targets})
    sft.run(sft.Config.model_validate(keys), context)
    assert f"lora covers {note}" in context.events.read_text()
    stored = load_file(context.out / ADAPTER_WEIGHTS)
    assert any("mlp.experts" in key and part.any() for key, part in stored.items()) == (name == "qwen3_moe")
    config = files.read_json(context.out / "adapter_config.json")
    assert (config["target_parameters"] or []) == sorted(config["target_parameters"] or [])


def test_one_of_two_projections_that_are_one_parameter_is_refused(tmp_path: Path) -> None:
    model = open_model(make(tmp_path / "base", "qwen3_moe"))
    for names, message in (
        (["gate_proj", "q_proj"], "lora: .* gate_proj without also targeting up_proj"),
        (["q_proj", "gate_prj"], r"lora\.target_modules: 'gate_prj' is no module"),
    ):
        with pytest.raises(UserError, match=message):
            adapter_settings.lora_config({"target_modules": names}, model)
