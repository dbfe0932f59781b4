"""What a plan can say of a model folder that no stage made."""

import json

import pytest

from cordee import model_folder
from cordee.cost import Cost
from cordee.errors import Fault, UserError


def weights(shapes: dict[str, list[int]]) -> bytes:
    """The beginning of a safetensors file; the numbers themselves are never read."""
    tensors = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 512}')
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(weights({"embed": [512, 8], "norm": [8]}))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(weights({"head": [512, 8], "scale": []}))
    (tmp_path / "consolidated.safetensors").write_bytes(weights({"all": [9999]}))
    return tmp_path


def test_parameters_and_vocabulary_stand_in_the_folder(folder):
    assert model_folder.cost(folder, "model", {}) == Cost(parameters=2 * 512 * 8 + 8 + 1, vocab_size=512)


def test_what_a_stage_told_goes_before(folder):
    told = Cost(parameters=3)
    assert model_folder.cost(folder, "model", {"model": told}) is told
    assert model_folder.cost(folder / "nothing", "model", {"model": told}) is told


def test_a_text_model_within_another_counts_its_own_vocabulary(folder):
    (folder / "config.json").write_text('{"text_config": {"vocab_size": 64}}')
    assert model_folder.cost(folder, "model", {}).vocab_size == 64


@pytest.mark.parametrize("header", [b"", b"\x08\0\0\0\0\0\0\0not json", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_header_that_is_none_is_a_fault(folder, header):
    (folder / "model-00002-of-00002.safetensors").write_bytes(header)
    with pytest.raises(Fault, match=r"00002\.safetensors: is damaged: its header can't be read"):
        model_folder.cost(folder, "model", {})


def test_what_is_no_model_is_named(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r": model: is no Hugging Face model: it has no config\.json"):
        model_folder.cost(folder, "model", {})


def test_a_trainers_folder_leads_to_its_newest_checkpoint(folder):
    """The newest by its number, not by its name."""
    outer = folder / "trained"
    for step in (500, 900, 1000):
        (outer / f"checkpoint-{step}").mkdir(parents=True)
        (outer / f"checkpoint-{step}" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no config\.json; did you mean trained/checkpoint-1000\?"):
        model_folder.require(outer)
    (outer / "checkpoints").mkdir()
    for step in (70, 1200):
        (outer / "checkpoints" / str(step)).mkdir()
        (outer / "checkpoints" / str(step) / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"did you mean trained/checkpoints/1200\?"):
        model_folder.require(outer)


def test_shards_that_the_index_names_have_to_be_there(folder):
    names = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    index = {"weight_map": {f"weight{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").rename(folder / names[number - 1])
    with pytest.raises(UserError, match=r"lacks 2 of the 4 files of weights that its index names: model-00003-of"):
        model_folder.require(folder)
    for name in names[2:]:
        (folder / name).write_bytes(weights({"more": [2, 2]}))
    assert model_folder.cost(folder, "model", {}).parameters == 2 * 512 * 8 + 8 + 1 + 2 * 4


def test_a_single_file_goes_before_an_older_index_as_in_transformers(folder):
    (folder / "model.safetensors").write_bytes(weights({"all": [4]}))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert model_folder.weights(folder) == [folder / "model.safetensors"]


def test_weights_of_torch_do_not_count(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert [path.suffix for path in model_folder.weights(folder)] == [".safetensors"] * 2
    model_folder.require(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert model_folder.weights(folder) == []
    with pytest.raises(UserError, match=r"model: holds no safetensors, and pytorch_model\.bin is a pickle, .* trust"):
        model_folder.require(folder, "model")


def test_whole_weights_beside_an_adapter_config_are_refused(folder):
    """PEFT's `save_pretrained`, then `merge_and_unload().save_pretrained`: transformers puts the adapter on again."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(weights({"lora_A": [2, 8]}))
    message = r"model: holds whole weights and adapter_config\.json: .* can't be known; move adapter_config"
    for check in (model_folder.require, model_folder.require_served):
        with pytest.raises(UserError, match=message):
            check(folder, "model")
    with pytest.raises(UserError, match=message):
        model_folder.cost(folder, "model", {})
    for path in folder.glob("model-*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="is an adapter, not a model"):
        model_folder.require(folder)


def test_an_adapter_of_the_hub_finds_its_base_beside_it_and_in_the_cache(tmp_path):
    cached, beside = tmp_path / "cache", tmp_path / "fetched" / "models"
    (cached / "models--o--m" / "refs").mkdir(parents=True)
    (cached / "models--o--m" / "refs" / "main").write_text("abc")
    adapters = [cached / "models--o--lora" / "snapshots" / "def", beside / "o" / "lora"]
    bases = [cached / "models--o--m" / "snapshots" / "abc", beside / "o" / "m"]
    for adapter, base in zip(adapters, bases, strict=True):
        for place, name, told in (
            (adapter, "adapter_config", {"base_model_name_or_path": "o/m"}),
            (base, "config", {}),
        ):
            place.mkdir(parents=True)
            (place / f"{name}.json").write_text(json.dumps(told))
        assert model_folder.recorded_base(adapter) == base
        (base / "config.json").unlink()
        assert model_folder.recorded_base(adapter) is None
        with pytest.raises(UserError, match=r"'o/m' is no model folder here; .*where hub:o/m is fetched too"):
            model_folder.base_of(adapter)
