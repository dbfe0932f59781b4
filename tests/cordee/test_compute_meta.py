"""A model that is filled module by module has the bits of one that transformers makes in memory."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from cordee.compute import meta
from cordee.errors import Fault

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "apertus": {}, "llama": {"tie_word_embeddings": True}, "qwen3": {}, "gemma3_text": {"head_dim": 8}, "olmo2": {},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16}, "mixtral": {"num_local_experts": 4},
    "smollm3": {}, "phi3": {},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Tensors on both sides of the limit."""
    monkeypatch.setattr(meta, "SMALL", 200)


def maker(kind, fields):
    config = CONFIG_MAPPING[kind](**fields)
    return lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def everything(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_drawn_module_by_module_has_the_bits_of_a_model_in_memory(kind):
    make, found = maker(kind, SIZES | MODELS[kind]), {}
    torch.manual_seed(3)
    expected, after = everything(make()), torch.rand(3)
    meta.draw(make, 3, lambda name, value: found.__setitem__(name, value.clone()))
    assert after.equal(torch.rand(3)), "the generator goes on alike"
    assert [name for name, value in expected.items() if not value.equal(found[name])] == []
    assert all(tensor.is_meta for tensor in everything(meta.shapes(make)).values())


def test_an_architecture_that_sets_weights_outside_of_their_module_is_told():
    make = maker("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100})
    with pytest.raises(meta.NotByModule):
        meta.draw(make, 3, lambda _name, _value: None)
    torch.manual_seed(3)
    assert not any(tensor.is_meta for tensor in everything(make()).values()), "transformers is as it was"


def test_a_folder_is_read_by_name_and_what_is_not_finite_or_named_otherwise_is_told(tmp_path):
    make = maker("llama", SIZES)
    there = make()
    there.save_pretrained(tmp_path)
    model = meta.shapes(make).to_empty(device="cpu")
    meta.read(make, tmp_path, everything(model))
    expected = everything(there)
    assert [name for name, value in everything(model).items() if not value.equal(expected[name])] == []
    state = {name: value.clone() for name, value in there.state_dict().items()}
    state["model.norm.weight"][3] = torch.nan
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(Fault, match=r"model\.norm\.weight holds values that are not finite"):
        meta.read(make, tmp_path, everything(model))
    save_file(state | {"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(meta.NotByModule):
        meta.read(make, tmp_path, everything(model))
