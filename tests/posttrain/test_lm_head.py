"""The loss is that of the model's own logits, where TRL's fused LM head leaves out a part of the model too."""

from pathlib import Path
from typing import Any

import encoding
import pytest
import torch
from architectures import ARCHITECTURES, CHATML, WIDTH, Architecture, chats, make, mean_loss, pairs_file, sft_keys
from transformers import AutoModelForCausalLM, AutoTokenizer

from cordee.chat.source import Limits
from cordee.files import read_json_lines
from posttrain import dpo, sft

RECURRENT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
RECURRENT |= {"lru_width": 16, "attention_window_size": 64, "num_key_value_heads": 1, "head_dim": 8}
BERT = WIDTH | {"cls_token_id": 0, "sep_token_id": 0, "initializer_range": 0.5}
LEFT_OUT: dict[str, Architecture] = {
    "recurrent_gemma": ("RecurrentGemmaConfig", RECURRENT | {"logits_soft_cap": 0.1}, "qwen2", CHATML),
    "modernbert_decoder": ("ModernBertDecoderConfig", BERT, "smollm2", CHATML),
}
TINY = {"learning_rate": 1e-12, "max_steps": 1}


@pytest.fixture(params=LEFT_OUT)
def model(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of which TRL's head leaves out a part."""
    monkeypatch.setitem(ARCHITECTURES, request.param, LEFT_OUT[request.param])
    return make(tmp_path / "model", request.param)


def notes(context: Any) -> str:
    return context.events.read_text()


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": "all-linear"}])
def test_sft(model: Path, tmp_path: Path, new_context: Any, lora: Any) -> None:
    file, context = chats(tmp_path), new_context("sft")
    given = sft_keys(model, file, heldout=[{"path": str(file)}], lora=lora, trainer=TINY)
    metrics = sft.run(sft.Config.model_validate(given), context)
    assert "TRL's fused LM head leaves out a part of this model" in notes(context)
    own = encoding.chats(file, AutoTokenizer.from_pretrained(model), Limits(256, 512, 100000))
    assert metrics["heldout_loss"] == pytest.approx(mean_loss(model, own), rel=1e-5)


def test_dpo(model: Path, tmp_path: Path, new_context: Any) -> None:
    file, context = pairs_file(tmp_path, 4), new_context("dpo")
    given = sft_keys(model, file, trainer=TINY | {"use_weighting": True})
    dpo.run(dpo.Config.model_validate(given), context)
    row = next(row for row in read_json_lines(context.out / "metrics.jsonl") if "loss" in row)
    opened, sums = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval(), []
    for pair in dpo_pairs(dpo.Config.model_validate(given), new_context("again")):
        ids = torch.tensor([pair.prompt + pair.chosen])
        with torch.no_grad():
            logprobs = opened(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        each = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
        sums.append(float(each[len(pair.prompt) - 1 :].sum()))
    assert row["logps/chosen"] == pytest.approx(sum(sums) / len(sums), rel=1e-5)


def dpo_pairs(config: dpo.Config, context: Any) -> Any:
    from cordee.chat.tokenized import Tokenized
    from posttrain.training import reading, skeleton

    model, tokenizer = skeleton.open_model(config)
    return reading.read(config, "pairs", model, tokenizer, 256, context, Tokenized.pair)[0]


def test_other_models_keep_trls_head(tmp_path: Path, new_context: Any) -> None:
    context = new_context("sft")
    given = sft_keys(make(tmp_path / "model", "gemma2"), chats(tmp_path), trainer=TINY)
    sft.run(sft.Config.model_validate(given), context)
    assert "fused LM head" not in notes(context)
