"""What a training starts from: added tokens, adapters, and options of the model."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CHATML, align, logits, make, opened, sft_keys, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cordee import files, recipe
from cordee.errors import UserError
from cordee.stage import Context
from posttrain import dpo, merge, sft
from posttrain.training import skeleton

NewContext = Callable[[str], Context]


# Added tokens


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "gemma3"])
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_added_tokens_are_trained_and_published(
    tmp_path: Path, data: Path, new_context: NewContext, name: str, lora: dict[str, Any] | None
) -> None:
    base, context = make(tmp_path / "base", name), new_context("sft")
    rows = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight.shape[0]
    tokens = ["<|turn|>", "<|im_end|>"] if name != "llama_tied" else ["<|turn|>", "<|stop|>"]
    template = CHATML.replace("<|im_start|>", tokens[0]).replace("<|im_end|>", tokens[1])
    (tmp_path / "own.jinja").write_text(template)
    train(context, base, data, chat_template=str(tmp_path / "own.jinja"), added_tokens=tokens, lora=lora)
    tokenizer = AutoTokenizer.from_pretrained(context.out)
    assert tokenizer.convert_tokens_to_ids(tokens) == [rows, rows + 1]
    out = context.out
    if lora:
        merged = new_context("merged")
        merge.run(merge.Config.model_validate({"adapter": str(out)}), merged)
        out = merged.out
        torch.testing.assert_close(logits(opened(context.out), out), logits(opened(out), out), atol=1e-4, rtol=0)
    again = opened(out)
    assert again.get_input_embeddings().weight.shape[0] == rows + 2
    assert again.config.get_text_config().vocab_size == rows + 2
    tied = name in ("llama_tied", "gpt2", "gemma3")
    assert again.config.tie_word_embeddings == tied
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert len({tuple(row.tolist()) for row in again.get_output_embeddings().weight[rows:]}) == 2


def test_added_tokens_that_no_template_writes_are_content(tmp_path: Path, new_context: NewContext) -> None:
    """They may stand in an answer, and a reader sees them there; a marker of a turn may not."""
    base, context, file = make(tmp_path / "base", "olmo2"), new_context("sft"), tmp_path / "own.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<answer>b</answer>"}]}
    file.write_text(f"{json.dumps(row)}\n" * 4)
    train(context, base, file, added_tokens=["<answer>", "</answer>"])
    tokenizer = AutoTokenizer.from_pretrained(context.out)
    ids = tokenizer("<answer>b</answer>", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<answer>b</answer>"


# Adapters as models


@pytest.fixture
def adapter(tmp_path: Path, data: Path, new_context: NewContext) -> Path:
    """An adapter with an effect, of a model in `tmp_path/base`."""
    context = new_context("first")
    train(context, make(tmp_path / "base", "llama_tied"), data, lora={"r": 2})
    return context.out


def test_an_adapter_is_trained_on(adapter: Path, data: Path, new_context: NewContext) -> None:
    context = new_context("second")
    metrics = train(context, adapter, data)
    before, after = (
        load_file(adapter / "adapter_model.safetensors"),
        load_file(context.out / "adapter_model.safetensors"),
    )
    assert set(before) == set(after)
    assert not any(before[name].equal(after[name]) for name in before)
    assert metrics["trainable_parameters"] == sum(value.numel() for value in after.values())
    assert files.read_json(context.out / "adapter_config.json")["base_model_name_or_path"] == "../base"


def test_dpo_of_an_adapter_starts_at_it_and_not_at_its_base(
    adapter: Path, pairs: Path, new_context: NewContext
) -> None:
    context = new_context("dpo")
    metrics = align(context, adapter, pairs, trainer={"learning_rate": 1e-3})
    first = files.read_json_lines(context.out / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    stored = load_file(context.out / "adapter_model.safetensors")
    assert metrics["trainable_parameters"] == sum(value.numel() for value in stored.values())
    assert not [path for path in context.out.iterdir() if path.is_dir()]


@pytest.mark.parametrize("stage", [train, align])
def test_a_second_adapter_is_published_as_one_with_the_first(
    adapter: Path, data: Path, pairs: Path, new_context: NewContext, stage: Any
) -> None:
    context, file = new_context("sum"), data if stage is train else pairs
    lora = {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}
    stage(context, adapter, file, adapter="new", lora=lora)
    assert files.read_json(context.out / "adapter_config.json")["base_model_name_or_path"] == "../base"
    config = sft.Config.model_validate(sft_keys(adapter, data, adapter="new", lora=lora))
    earlier, _ = skeleton.open_model(config)
    torch.testing.assert_close(logits(earlier, adapter), logits(opened(adapter), adapter), atol=1e-5, rtol=0)
    stored = load_file(context.out / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0"
    assert stored[f"{layer}.self_attn.q_proj.lora_A.weight"].shape[0] == 6
    assert stored[f"{layer}.self_attn.k_proj.lora_A.weight"].shape[0] == 2
    old = load_file(adapter / "adapter_model.safetensors")
    name = f"{layer}.self_attn.k_proj.lora"
    up, down = (stored[f"{name}_{side}.weight"].double() for side in "BA")
    up_before, down_before = (old[f"{name}_{side}.weight"].double() for side in "BA")
    torch.testing.assert_close(up @ down, 8 / 2 * up_before @ down_before)
    merged = new_context("merged")
    assert merge.run(merge.Config.model_validate({"adapter": str(context.out)}), merged)["adapter_effect_nats"] > 0
    assert not torch.allclose(logits(opened(merged.out), adapter), logits(earlier, adapter), atol=1e-3)


def test_the_sum_is_what_was_trained(
    adapter: Path, data: Path, new_context: NewContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model in memory says the same as the folder that is published."""
    said, publish = [], skeleton.publish

    def seen(trainer: Any, *rest: Any) -> None:
        said.append(logits(trainer.model, adapter))
        publish(trainer, *rest)

    monkeypatch.setattr(skeleton, "publish", seen)
    context = new_context("sum")
    train(context, adapter, data, adapter="new", lora={"r": 4})
    torch.testing.assert_close(said[-1], logits(opened(context.out), adapter), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", [train, align])
def test_an_adapter_is_merged_and_all_weights_are_trained(
    adapter: Path, data: Path, pairs: Path, new_context: NewContext, stage: Any
) -> None:
    context = new_context("full")
    stage(context, adapter, data if stage is train else pairs, adapter="new")
    assert (context.out / "model.safetensors").is_file()
    assert opened(context.out).config.tie_word_embeddings
    if stage is align:
        assert files.read_json_lines(context.out / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora": {"r": 2}}, "lora: `model` is an adapter already; `adapter: new` .* without `lora` it is trained on"),
        ({"lora": {"r": 2}, "adapter": "continue"}, "lora: `adapter: continue` keeps the settings"),
        ({"adapter": "new", "lora": {"r": 2, "use_dora": True}}, "adapter: `lora:` sets use_dora"),
        ({"adapter": "continue", "added_tokens": ["<x>"]}, "added_tokens: the adapter has no weights for them"),
    ],
)
def test_keys_that_do_not_fit_an_adapter_are_refused(
    adapter: Path, data: Path, new_context: NewContext, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(new_context("refused"), adapter, data, **keys)


def test_keys_of_an_adapter_beside_a_model_are_refused(tmp_path: Path, data: Path) -> None:
    base = make(tmp_path / "base", "llama")
    for keys in ({"adapter": "new"}, {"base": str(base)}):
        with pytest.raises(UserError, match=r"is for an adapter, and .* is a model"):
            skeleton.open_model(sft.Config.model_validate(sft_keys(base, data, **keys)))


def test_a_base_that_is_not_here_has_to_be_given(
    tmp_path: Path, adapter: Path, data: Path, new_context: NewContext
) -> None:
    told = files.read_json(adapter / "adapter_config.json")
    files.write_json(adapter / "adapter_config.json", told | {"base_model_name_or_path": "some/hub-name"})
    with pytest.raises(UserError, match=r"model: its base 'some/hub-name' is no model folder here; .* as `base:`"):
        train(new_context("refused"), adapter, data)
    with pytest.raises(UserError, match=r"adapter: its base 'some/hub-name' is no model folder here; .* as `model:`"):
        merge.run(merge.Config.model_validate({"adapter": str(adapter)}), new_context("merged"))
    train(new_context("second"), adapter, data, base=str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_dtype": "bfloat16"}, r"\.torch_dtype: the stage sets this itself; .* write `dtype`, its new name"),
        ({"dtype": "bf16"}, r"\.dtype: unknown value 'bf16'; did you mean 'bfloat16'\?"),
        ({"dtype": "int"}, r"\.dtype: unknown value 'int'; known: auto, bfloat16, float16, float32"),
        ({"dtype": None}, r"\.dtype: unknown value None"),
        ({"atn_implementation": "sdpa"}, r"\.atn_implementation: unknown key; did you mean 'attn_implementation'\?"),
        ({"attn_implementation": "spda"}, r"\.attn_implementation: unknown value 'spda'; did you mean 'sdpa'\?"),
        ({"attn_implementation": "flash_attention_2"}, r": transformers refuses it: FlashAttention2"),
        ({"attention_dropout": "much"}, r": transformers refuses it: .*'much' doesn't match"),
        ({"local_files_only": False}, r"\.local_files_only: the stage sets this itself; leave it out"),
        ({"quantization_config": {}}, r"\.quantization_config: .* write the stage's `quantization`"),
        ('{"dtype": "bfloat16"}', r": must be a mapping"),
    ],
)
def test_an_option_of_the_model_that_is_wrong_is_one_line(
    tmp_path: Path, data: Path, options: Any, message: str
) -> None:
    if "flash" in str(options) and torch.cuda.is_available():
        pytest.skip("it may be installed here")
    keys = sft_keys(make(tmp_path / "base", "llama"), data, trainer={"model_init_kwargs": options})
    with pytest.raises(UserError, match="^trainer.model_init_kwargs" + message):
        skeleton.open_model(sft.Config.model_validate(keys))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_parameters", {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0}),
        ("rms_norm_eps", 0.01),
    ],
)
def test_a_field_of_the_models_config_is_published_with_a_model_and_refused_for_an_adapter(
    tmp_path: Path, adapter: Path, data: Path, new_context: NewContext, name: str, value: Any
) -> None:
    """PEFT records nothing of it: the merged model would compute without it."""
    harmless = {"use_cache": False, "attention_dropout": 0.1, "hidden_act": "silu", "attn_implementation": "eager"}
    keys = sft_keys(tmp_path / "base", data, lora={"r": 2}, trainer={"model_init_kwargs": harmless})
    assert skeleton.open_model(sft.Config.model_validate(keys))[0].config.attention_dropout == 0.1
    trainer = {"model_init_kwargs": {name: value}}
    for model, keys in ((tmp_path / "base", {"lora": {"r": 2}}), (adapter, {})):
        with pytest.raises(UserError, match=rf"model_init_kwargs\.{name}: .* into config\.json of a copy of"):
            train(new_context("refused"), model, data, trainer=trainer, **keys)
    full = new_context("full")
    train(full, tmp_path / "base", data, trainer=trainer)
    assert files.read_json(full.out / "config.json")[name] == value


def test_quantization_needs_cuda(tmp_path: Path, data: Path) -> None:
    keys = sft_keys(make(tmp_path / "base", "llama"), data, quantization={"load_in_4bit": True})
    with pytest.raises(UserError, match="quantization: weights that are quantized can't be trained"):
        skeleton.open_model(sft.Config.model_validate(keys))
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with pytest.raises(UserError, match="quantization: bitsandbytes quantizes on CUDA"):
        skeleton.open_model(sft.Config.model_validate(keys | {"lora": {"r": 2}}))


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("pad_token", "the stage's `pad_token`"),
        ("chat_template_path", "the stage's `chat_template`"),
        ("eos_token", "the end of an answer into the stage's `chat_template`"),
        ("report_to", "the stage's `report_to`"),
        *((key, "the stage's `heldout`") for key in ("eval_strategy", "eval_steps", "do_eval")),
        ("save_total_limit", "`save_steps` and `resume_steps` of the stage"),
    ],
)
@pytest.mark.parametrize("stage", [sft, dpo])
def test_a_key_of_trl_that_the_stage_has_itself_names_the_stages_own(stage: Any, key: str, instead: str) -> None:
    keys = {"model": "m", "data": [{"path": "d"}], "trainer": {key: "x"}}
    with pytest.raises(UserError, match=f"trainer.{key}: the stage sets this itself; leave it out, or write {instead}"):
        recipe.validate(stage.Config, keys, "r.yaml", "stages.s")
