import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from architectures import trained_adapter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from cordee.compute.adapter import PLAIN_STARTS
from cordee.compute.model import open_model
from cordee.errors import Fault, UserError
from posttrain.training import adapter_settings, adapter_sums, adapters


@pytest.fixture
def base(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "runs" / "sft@1")


@pytest.fixture
def adapter(base: Path) -> Path:
    return trained_adapter(base, base.parent / "dpo@1.partial")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, r"lora\.target_modules: 'v_prj' is no module .*mean 'v_proj'"),
        ({"target_modules": ".*query"}, r"lora\.target_modules: '\.\*query' matches no module"),
        ({"modules_to_save": ["lm_haed"]}, r"lora\.modules_to_save: .*mean 'lm_head'"),
        ({"rank_pattern": {"q_porj": 8}}, r"lora\.rank_pattern: .*mean '.*_proj'"),
        ({"layers_to_transform": [0, 2], "target_modules": ["q_proj"]}, "there is no layer 2: the model has 2"),
    ],
)
def test_a_name_that_peft_would_leave_out_without_a_word_is_refused(
    model_folder: Path, lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        adapter_settings.lora_config(lora, open_model(model_folder))


@pytest.mark.parametrize("start", ["pissa_niter_4", "eva"])
def test_a_start_that_is_drawn_anew_when_it_is_opened_is_refused(model_folder: Path, start: str) -> None:
    with pytest.raises(UserError, match=rf"lora\.init_lora_weights: '{start}' draws at random"):
        adapter_settings.lora_config({"r": 4, "init_lora_weights": start}, open_model(model_folder))


@pytest.mark.parametrize("start", [*PLAIN_STARTS, "pissa", "olora"])
def test_a_start_that_changes_the_base_alone_keeps_an_adapter_from_being_added_to(start: Any) -> None:
    earlier = LoraConfig(init_lora_weights=start)
    if start in PLAIN_STARTS:
        adapter_sums.require_addable(earlier, LoraConfig(), Path("sft@1"))
        return
    with pytest.raises(UserError, match="adapter: sft@1 sets init_lora_weights"):
        adapter_sums.require_addable(earlier, LoraConfig(), Path("sft@1"))


def test_without_target_modules_all_linear_layers_but_the_head_are_adapted(model_folder: Path) -> None:
    model = open_model(model_folder)
    adapted = get_peft_model(model, adapter_settings.lora_config({"r": 2}, model))
    names = {
        name.partition(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_A" in name
    }
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_training_one_of_two_tied_tables_is_refused(model_folder: Path, lora: dict[str, Any]) -> None:
    model = open_model(model_folder)
    adapter_settings.lora_config(lora, model)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(UserError, match="ties its embedding and its head"):
        adapter_settings.lora_config(lora, model)


def test_a_saved_adapter_names_its_base_by_place_and_by_content_and_no_machine(adapter: Path, base: Path) -> None:
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "../sft@1"
    assert written["target_modules"] == sorted(written["target_modules"])
    for path in adapter.iterdir():
        assert str(base.parent).encode() not in path.read_bytes(), path
    assert {path.name for path in adapter.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "base_model.json"),
        *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    }


def test_an_opened_adapter_holds_what_was_saved(adapter: Path, base: Path) -> None:
    saved = load_file(adapter / "adapter_model.safetensors")
    opened = adapters.open_adapter(adapter, open_model(base), base)
    for name, value in opened.state_dict().items():
        if ".lora_" in name:
            assert value.equal(saved[name.replace(".default", "")]), name


def test_an_adapter_of_other_weights_is_refused_though_its_shapes_fit(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"trained on other weights .*its base was \.\./sft@1"):
        adapters.open_adapter(adapter, open_model(other), other)


def test_an_adapter_of_another_shape_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    from transformers import ApertusConfig, ApertusForCausalLM

    (adapter / "base_model.json").unlink()
    told = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": "not/here"}))
    config = ApertusConfig.from_pretrained(base)
    config.intermediate_size = 96
    other = tmp_path / "other"
    ApertusForCausalLM(config).save_pretrained(other)
    with pytest.raises(UserError, match="does not fit"):
        adapters.open_adapter(adapter, open_model(other), other)


def test_an_adapter_that_lacks_a_weight_is_refused(adapter: Path, base: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"1 weights have no counterpart, such as {name}"):
        adapters.open_adapter(adapter, open_model(base), base)


def test_a_folder_that_is_no_lora_adapter_is_named_for_what_it_is(adapter: Path, base: Path, tmp_path: Path) -> None:
    model = open_model(base)
    with pytest.raises(UserError, match="is a model, not an adapter"):
        adapters.open_adapter(base, model, base)
    with pytest.raises(UserError, match="has no adapter_config"):
        adapters.open_adapter(tmp_path, model, base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(UserError, match="of the kind 'IA3'"):
        adapters.open_adapter(adapter, model, base)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        adapters.open_adapter(adapter, model, base)


def test_a_damaged_adapter_is_a_fault(adapter: Path, base: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(Fault, match="can't be opened as an adapter"):
        adapters.open_adapter(adapter, open_model(base), base)
    file.write_bytes(whole)
    weights = load_file(file)
    weights[sorted(weights)[0]][0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(Fault, match="not finite"):
        adapters.open_adapter(adapter, open_model(base), base)
