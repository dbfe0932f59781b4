"""Small Apertus checkpoints with the project's chat template and special tokens."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ApertusConfig, ApertusForCausalLM

from cordee.chat import base
from cordee.compute.model import open_model, save_model

SPECIAL = ["<s>", "</s>", "<pad>", "<|system_start|>", "<|system_end|>", "<|user_start|>", "<|user_end|>",
           "<|assistant_start|>", "<|assistant_end|>"]  # fmt: skip


def make_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer with a few merges."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True) for name in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Which language is this? German French Menschen hommes"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(base.TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def make_model(folder: Path, hidden_size: int = 64, *, tied: bool = False) -> Path:
    """A checkpoint with random weights, large enough that two of them differ at every token."""
    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    model = ApertusForCausalLM(
        ApertusConfig(
            vocab_size=len(vocabulary), hidden_size=hidden_size, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
            pad_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=tied,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    save_model(model, folder, tokenizer=tokenizer)
    return folder


def make_adapter(folder: Path, base: Path, *, seed: int, **settings: Any) -> Path:
    """A LoRA adapter as PEFT writes it, with random weights in all of its matrices unless `settings` say otherwise."""
    torch.manual_seed(seed)
    given = {"target_modules": "all-linear", "init_lora_weights": False, **settings}
    adapted = get_peft_model(open_model(base), LoraConfig(**given, task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder)
    return folder
