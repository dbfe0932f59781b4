"""Small tokenizers built as the known families build theirs, each with the settings that its makers publish.

Each maker of one returns the pipeline, the `tokenizer_config.json` and the `model_type` of the config beside it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = [
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. All human beings are born free and equal, 1948.",
    "def f(x):\n    return {'a': [x ** 2], 'b': 12345}\n\n",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
] * 8
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
Made = tuple[Tokenizer, dict[str, Any], str]


def byte_level(special: list[str], pre: Any = None, normalizer: Any = None, **model: Any) -> Tokenizer:
    """Byte-level BPE; `special` take the first ids."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def pieces(special: list[str], normalizer: Any = None, pre: Any = None, *, strip: bool = True) -> Tokenizer:
    """BPE over pieces with `▁` for spaces and bytes for what is unknown, as converted from SentencePiece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    first = [*special, *(f"<0x{number:02X}>" for number in range(256))]
    # trained on words, or the pieces would be whole texts
    training = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    training.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=first, show_progress=False)
    training.train_from_iterator(TEXT, trainer)
    told = json.loads(training.to_str())
    model = {**told["model"], "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    whole = {**json.loads(tokenizer.to_str()), "model": model}
    whole["added_tokens"] = [token for token in told["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    ends = [decoders.Strip(content=" ", left=1, right=0)] if strip else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return tokenizer


def begins_with(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """The same, with a token in front of each text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{token} $A", f"{token} $A {token} $B", [(token, tokenizer.token_to_id(token))]
    )
    return tokenizer


def split(pattern: str) -> Any:
    """A regular expression, then bytes."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])


def llama2() -> Made:
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made = begins_with(pieces(["<unk>", "<s>", "</s>"], prepend), "<s>")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    return made, config | {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "llama"


def llama2_legacy() -> Made:
    made, config, kind = llama2()
    return made, config | {"legacy": True, "tokenizer_class": "LlamaTokenizerFast"}, kind


def metaspace() -> Made:
    made = pieces(["<unk>", "<s>", "</s>"], None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False, "legacy": False}
    return made, config | {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "llama"


def llama3() -> Made:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    made = begins_with(byte_level(special, split(LLAMA3), ignore_merges=True), special[0])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), made.post_processor])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[4]}
    return made, config, "llama"


def qwen2() -> Made:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = byte_level(special, split(QWEN), normalizers.NFC())
    made.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "unk_token": None}
    return made, config | {"pad_token": "<|endoftext|>", "add_prefix_space": False, "add_bos_token": False}, "qwen2"


def qwen3() -> Made:
    made, config, _ = qwen2()
    return made, config, "qwen3"


def gpt2() -> Made:
    made = byte_level(["<|endoftext|>"])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made, {"add_prefix_space": False, "model_max_length": 1024}, "gpt2"


def smollm2() -> Made:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pre = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    made = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"], pre)
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return made, config | {"pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}, "llama"


def olmo2() -> Made:
    made = byte_level(["<|endoftext|>", "<|pad|>"], split(LLAMA3))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return made, config | {"pad_token": "<|pad|>", "unk_token": "<|endoftext|>"}, "olmo2"


def gemma() -> Made:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    pre = pre_tokenizers.Split(" ", "merged_with_previous")
    made = begins_with(pieces(special, normalizers.Replace(" ", "▁"), pre, strip=False), "<bos>")
    names = {name: f"<{name.removesuffix('_token')}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return made, {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, **names}, "gemma2"


def phi3() -> Made:
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made = pieces(["<unk>", "<s>", "</s>", "<|endoftext|>"], prepend)
    for name in ("<|user|>", "<|assistant|>", "<|end|>"):
        made.add_special_tokens([AddedToken(name, rstrip=True, normalized=False, special=True)])
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": False, "bos_token": "<s>"}
    config |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    tokens = made.get_added_tokens_decoder().items()
    config["added_tokens_decoder"] = {
        str(number): {name: getattr(token, name) for name in ("content", *FLAGS)} for number, token in tokens
    }
    return made, config, "phi3"


def pythia() -> Made:
    made = byte_level(["<|endoftext|>", "<|padding|>"], None, normalizers.NFC())
    made.add_tokens([AddedToken(" " * count, normalized=True) for count in range(2, 8)])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return made, {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False, **names}, "gpt_neox"


def falcon() -> Made:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = [pre_tokenizers.Punctuation("contiguous"), level, pre_tokenizers.Digits(), pre_tokenizers.Split(
        Regex("[0-9][0-9][0-9]"), "isolated")]  # fmt: skip
    made = byte_level([">>TITLE<<", "<|endoftext|>"], pre_tokenizers.Sequence(parts))
    return made, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}, "falcon"


def unigram() -> Made:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    return made, config | {"pad_token": "<pad>"}, "llama"


def mistral_tekken() -> Made:
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    made = begins_with(byte_level(special, split(LLAMA3), ignore_merges=True), "<s>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return made, {"tokenizer_class": "PreTrainedTokenizerFast", **names}, "mistral"


def padded() -> Made:
    """A pad token that was added later, which only the settings name."""
    made, config, kind = llama2()
    return made, config | {"pad_token": "[PAD]"}, kind


def stripping() -> Made:
    """Added tokens that take the spaces beside them."""
    made, config, kind = llama3()
    made.add_special_tokens([AddedToken("<|left|>", lstrip=True), AddedToken("<|both|>", lstrip=True, rstrip=True)])
    made.add_tokens([AddedToken("Würde", single_word=True)])
    return made, config, kind


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
STOCK: dict[str, Callable[[], Made]] = {
    maker.__name__: maker
    for maker in (
        *(llama2, llama2_legacy, metaspace, llama3, qwen2, qwen3, gpt2, smollm2, olmo2, gemma, phi3, pythia, falcon),
        *(unigram, mistral_tekken, padded, stripping),
    )
}


def write(folder: Path, made: Made, *, beside_model: bool = True) -> Path:
    """Write a tokenizer's folder, with the config of a model beside it."""
    tokenizer, settings, kind = made
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if beside_model:
        (folder / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    return folder
