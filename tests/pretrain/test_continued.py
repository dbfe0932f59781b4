"""Training a model of another family further: it has to hold the data, and its maker's settings stay."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from cordee.errors import UserError
from pretrain.data.loader import open_split, require_ids_below
from pretrain.training.model import blueprint, build, shape

VOCAB_SIZE = 512
SHAPE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
FAMILIES = {
    "llama": SHAPE,
    "gpt2": {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gemma3": {"text_config": SHAPE, "vision_config": VISION, "mm_tokens_per_image": 4},
}
MAKERS = {"eos_token_id": 4, "do_sample": True, "temperature": 0.6, "max_new_tokens": 77}
LENGTHS = [20, 13, 31, 40, 9, 25]


def write_model(folder, family, tokens, **changed):
    """A model with random weights, the tokenizer of some tokens, and its maker's generation settings."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**FAMILIES[family] | changed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    shutil.copytree(tokens / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(MAKERS))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_another_family_is_trained_on_and_keeps_its_makers_settings(family, tmp_path, make_tokens, trained):
    tokens = make_tokens("data", LENGTHS)
    model = write_model(tmp_path / "model", family, tokens)
    out, metrics = trained(
        "run", model=str(model), data=[{"tokens": str(tokens)}], sequence_length=48, max_steps=2, save_steps=[1],
        warmup_steps=0, decay_steps=0, global_batch_size=2, resume_steps=2,
    )  # fmt: skip
    assert metrics["tokens"] > 0
    before = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight
    for place in (out / "checkpoints/1", out):
        assert json.loads((place / "generation_config.json").read_text()) == MAKERS
        assert not AutoModelForCausalLM.from_pretrained(place).get_input_embeddings().weight.equal(before)
        assert AutoTokenizer.from_pretrained(place).chat_template


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_longer_than_the_models_positions_are_refused(family, tmp_path, make_tokens):
    tokens = make_tokens("data", LENGTHS)
    model = write_model(tmp_path / "model", family, tokens)
    with pytest.raises(UserError, match=r"max_position_embeddings: 64 positions do not hold a sequence_length of 65"):
        build(model, tokens, 65, seed=0)


@pytest.mark.parametrize("opens", [shape, partial(blueprint, sequence_length=48)], ids=["shape", "blueprint"])
def test_a_model_that_needs_code_of_its_folder_is_refused_in_one_line(opens, tmp_path, make_tokens):
    tokens = make_tokens("data", LENGTHS)
    model = write_model(tmp_path / "model", "llama", tokens)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'it-ran')!r})\n")
    with pytest.raises(UserError, match="has no model 'own', and code in a model's folder is not run"):
        opens(model, tokens)
    assert not (tmp_path / "it-ran").exists()


def test_ids_beyond_the_embedding_table_are_refused_and_the_document_is_named(tmp_path, make_tokens, trained):
    tokens = make_tokens("data", LENGTHS)
    split = open_split(tokens, "train", 16, "split", "data.0.tokens")
    holders = [
        (number + 1, int(ids[ids >= 480][0]))
        for number, ids in enumerate(np.split(np.array(split.ids), np.cumsum(LENGTHS)[:-1]))
        if (ids >= 480).any()
    ]
    assert len(holders) > 3
    shown = ", ".join(f"document {number} holds {largest}" for number, largest in holders[:3])
    said = f"{len(holders)} train documents hold ids beyond the 480 rows of the model's embedding table: {shown};"
    with pytest.raises(UserError, match=said):
        require_ids_below(480, split, tokens, "data.0.tokens")
    model = write_model(tmp_path / "model", "llama", tokens, vocab_size=480)
    with pytest.raises(UserError, match=r"data: data\.0\.tokens: \d train documents hold ids beyond the 480 rows"):
        trained("run", model=str(model), data=[{"tokens": str(tokens)}], sequence_length=48)


def test_a_token_beyond_the_table_that_no_text_holds_is_none_of_its_business(make_tokens):
    tokens = make_tokens("data", LENGTHS, vocab_size=500)
    (tokens / "tokens.json").write_text(
        json.dumps({"dtype": "uint16", "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1})
    )
    for name in ("train", "heldout"):
        require_ids_below(500, open_split(tokens, name, 16, "split", "d"), tokens, "d")


def test_all_documents_that_are_too_long_are_counted(make_tokens):
    tokens = make_tokens("data", LENGTHS)
    said = "3 of 6 train documents exceed sequence_length=24: document 3 has 31, document 4 has 40, document 6 has 25"
    with pytest.raises(UserError, match=said):
        open_split(tokens, "train", 24, "error", "data.0.tokens")


def test_a_new_model_beside_which_transformers_opens_another_tokenizer_is_refused(tmp_path, make_tokens):
    tokens = make_tokens("data", LENGTHS)
    fields = {name: value for name, value in SHAPE.items() if name != "head_dim"} | {"model_type": "qwen2"}
    (tmp_path / "m.yaml").write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    with pytest.raises(UserError, match=r"m\.yaml: model_type: beside a qwen2 model the tokenizer is used"):
        build(tmp_path / "m.yaml", tokens, 48, seed=0)
