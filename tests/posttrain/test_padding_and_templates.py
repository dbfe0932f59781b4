"""Padding tokens and chat templates that a recipe gives a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CHATML, align, make, settings_of, sft_keys, train
from safetensors.torch import load_file
from transformers import AutoTokenizer

from cordee import files
from cordee.chat import named
from cordee.compute import tokenizer_changes
from cordee.errors import UserError
from cordee.stage import Context
from posttrain import sft
from posttrain.training import skeleton

NewContext = Callable[[str], Context]


# Padding


def padding(folder: Path) -> Any:
    return settings_of(folder)["pad_token"]


def without_pad(told: dict[str, Any]) -> None:
    told.pop("pad_token", None)


@pytest.mark.parametrize(
    ("name", "pad", "why"),
    [
        ("llama", "<|eot_id|>", "end of text"),
        ("llama_tied", "<|endoftext|>", "ends no turn"),
        ("olmo2", "<|pad|>", "ends no turn"),
    ],
)
def test_a_tokenizer_without_padding_token_gets_one(
    tmp_path: Path, data: Path, new_context: NewContext, name: str, pad: str, why: str
) -> None:
    base, context = make(tmp_path / "base", name, change=without_pad), new_context("sft")
    train(context, base, data)
    assert padding(context.out) == pad
    assert AutoTokenizer.from_pretrained(context.out).pad_token == pad
    assert f"padding token: '{pad}'" in context.events.read_text()
    assert why in context.events.read_text()
    assert (context.out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_padding_token_that_a_config_names_is_taken(
    tmp_path: Path, data: Path, new_context: NewContext, file: str
) -> None:
    base, context = make(tmp_path / "base", "llama"), new_context("sft")
    files.write_json(base / file, files.read_json(base / file) | {"pad_token_id": 1})
    train(context, base, data)
    assert padding(context.out) == "<|end_of_text|>"
    assert f"which {file} names" in context.events.read_text()


def test_a_padding_token_that_a_language_models_config_names_is_taken(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "llama")
    told = files.read_json(base / "config.json")
    files.write_json(
        base / "config.json", {**told, "llm_config": {"vocab_size": told["vocab_size"], "pad_token_id": 1}}
    )
    _, notes = tokenizer_changes.changed(base, base, tokenizer_changes.Changes())
    assert notes == ["padding token: '<|end_of_text|>', which config.json names"]


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("packing", [True, False])
def test_what_is_learnt_does_not_depend_on_the_padding_token(
    tmp_path: Path, data: Path, new_context: NewContext, *, lora: dict[str, Any] | None, packing: bool
) -> None:
    """Also where it ends each turn and the config names it: its row in the embedding is trained all the same."""
    base = make(tmp_path / "base", "llama_tied")
    found = []
    for pad in ("<|im_end|>", "<repo_name>"):
        named = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(pad)
        files.write_json(base / "config.json", files.read_json(base / "config.json") | {"pad_token_id": named})
        context = new_context("end" if pad == "<|im_end|>" else "other")
        metrics = train(context, base, data, pad_token=pad, lora=lora, trainer={"packing": packing})
        weights = load_file(context.out / ("adapter_model.safetensors" if lora else "model.safetensors"))
        found.append((metrics["loss"], weights))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], atol=1e-6, rtol=0)


def test_dpo_does_not_depend_on_the_padding_token(tmp_path: Path, pairs: Path, new_context: NewContext) -> None:
    base = make(tmp_path / "base", "llama_tied")
    found = [
        align(new_context(f"pad{at}"), base, pairs, pad_token=pad)["loss"]
        for at, pad in enumerate(("<|im_end|>", "<repo_name>"))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize(("pad", "message"), [("<nix>", "no token of the vocabulary"), ("e", "ordinary piece of text")])
def test_a_padding_token_that_is_none_is_refused(tmp_path: Path, data: Path, pad: str, message: str) -> None:
    config = sft.Config.model_validate(sft_keys(make(tmp_path / "base", "llama"), data, pad_token=pad))
    with pytest.raises(UserError, match=f"pad_token: .*{message}"):
        skeleton.open_model(config)


def test_a_padding_token_beyond_the_embedding_is_not_used(tmp_path: Path, data: Path, new_context: NewContext) -> None:
    """As public folders have it, whose settings name one that the model never had."""
    base = make(tmp_path / "base", "llama", change=lambda told: told.update(pad_token="[PAD]"))
    context = new_context("sft")
    train(context, base, data)
    assert padding(context.out) == "<|eot_id|>"


# Chat templates


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_base_model_is_given_a_template(
    tmp_path: Path, data: Path, new_context: NewContext, lora: dict[str, Any] | None
) -> None:
    base = make(tmp_path / "base", "llama_tied", change=lambda told: told.pop("chat_template"))
    context = new_context("sft")
    train(context, base, data, chat_template="chatml", lora=lora)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    published = AutoTokenizer.from_pretrained(context.out)
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert published.apply_chat_template(messages, tokenize=False) == text
    assert (context.out / "chat_template.jinja").is_file()
    assert "several tokens" not in context.events.read_text()


def test_markers_that_are_no_tokens_are_said(tmp_path: Path, data: Path, new_context: NewContext) -> None:
    base = make(tmp_path / "base", "llama", change=lambda told: told.pop("chat_template"))
    context = new_context("sft")
    train(context, base, data, chat_template="chatml")
    assert "`added_tokens: [<|im_start|>, <|im_end|>]` makes them tokens" in context.events.read_text()


def test_a_template_of_a_file_replaces_the_models_own(tmp_path: Path, data: Path, new_context: NewContext) -> None:
    base, context = make(tmp_path / "base", "olmo2"), new_context("sft")
    (tmp_path / "own.jinja").write_text(CHATML)
    tokens = ["<|im_start|>", "<|im_end|>"]
    train(context, base, data, chat_template=str(tmp_path / "own.jinja"), added_tokens=tokens)
    assert AutoTokenizer.from_pretrained(context.out).chat_template == CHATML
    assert "chat_template" not in settings_of(context.out)
    assert files.read_json(context.out / "generation_config.json")["eos_token_id"][-1] == len(
        AutoTokenizer.from_pretrained(context.out)
    ) - 1  # fmt: skip


def test_templates_of_trl_are_found_by_their_names() -> None:
    known = named.templates()
    assert {"chatml", "qwen3", "llama3", "gemma3"} <= set(known)
    assert not [name for name in known if name.endswith("_training")]
    with pytest.raises(UserError, match=r"no template 'qwen33'; did you mean 'qwen3'\?"):
        sft.Config.model_validate({"model": "m", "data": [{"path": "d"}], "chat_template": "qwen33"})
