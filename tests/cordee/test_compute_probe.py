"""A model's probe is of the weights that it lies beside, and nothing else stands in for it."""

import shutil
from pathlib import Path

import manifests
import pytest
import torch

from cordee.compute import probe
from cordee.compute.logprobs import score
from cordee.compute.model import open_model, save_model
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import Fault


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, which has no xIELU, as the training stages write it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("probe")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(["<s>", "</s>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=40, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    made = LlamaForCausalLM(config).to(torch.bfloat16)
    save_model(made, folder / "model", tokenizer=folder / "tokenizer")
    return folder / "model"


def test_a_saved_model_has_what_transformers_says_in_float32(model):
    kept = probe.read(model)
    (expected,) = score(open_model(model, dtype=torch.float32), [open_tokenizer(model)(probe.TEXT)["input_ids"][:40]])
    assert len(kept.ids) == 40  # as many as the model has positions
    assert kept.logprobs.equal(expected.logprobs)


def test_an_artifacts_probe_is_taken_and_any_other_folder_is_scored(model, tmp_path):
    from cordee.compute.engine import probes

    folder = shutil.copytree(model, tmp_path / "spring@1")
    right = probe.read(folder).logprobs
    probe.write(folder, probe.Probe(probe.read(folder).ids, right + 1))
    assert probes([folder])[folder].logprobs.equal(right)  # a folder of anyone's: its weights may be others by now
    manifests.seal(folder)
    assert probes([folder])[folder].logprobs.equal(right + 1)


@pytest.mark.parametrize("name", ["probe.json", "model.safetensors"])
def test_an_artifact_that_was_changed_is_a_fault(name, model, tmp_path):
    from cordee.compute.engine import probes

    folder = shutil.copytree(model, tmp_path / "spring@1")
    manifests.seal(folder)
    damaged = bytearray((folder / name).read_bytes())
    damaged[-9] ^= 1
    (folder / name).write_bytes(damaged)
    with pytest.raises(Fault, match="is damaged"):
        probes([folder])


def test_a_probe_that_holds_something_else_is_a_fault(tmp_path):
    (tmp_path / probe.NAME).write_text('{"ids": [1, 2]}')
    with pytest.raises(Fault, match=r"probe\.json: is damaged: KeyError\('logprobs'\)"):
        probe.read(tmp_path)
