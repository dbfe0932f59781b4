"""Tokens made by hand, documents of random ids in the format of `pretrain.tokens`, and a short training on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 512
BOS, EOS, PAD = 0, 1, 2
LANGUAGES = ("de-CH", "rm", "fr-CH")


def write_tokens(
    folder: Path,
    lengths: Sequence[int],
    heldout: Sequence[int] = (9, 30, 17, 12),
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
) -> Path:
    """A tokens artifact whose documents have these lengths, `<s>` and `</s>` counted, and ids below `vocab_size`."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for split, sizes in (("train", lengths), ("heldout", heldout)):
        documents = [np.array([BOS, *rng.integers(3, vocab_size, size - 2), EOS], dtype="<u2") for size in sizes]
        (folder / f"{split}.bin").write_bytes(b"".join(document.tobytes() for document in documents))
        np.save(folder / f"{split}.offsets.npy", np.cumsum([0, *sizes]).astype(np.int64))
    rows = [{"language": LANGUAGES[index % 3], "bytes": 3 * size} for index, size in enumerate(heldout)]
    (folder / "heldout.documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = {"dtype": "uint16", "vocab_size": VOCAB_SIZE, "bos_token_id": BOS, "eos_token_id": EOS}
    (folder / "tokens.json").write_text(json.dumps(described))
    _write_tokenizer(folder / "tokenizer")
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<s>", "</s>", "<pad>", "<|assistant_start|>", "<|assistant_end|>"]
    words = {word: index for index, word in enumerate([*special, *(f"w{n}" for n in range(VOCAB_SIZE - len(special)))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for message in messages %}{{ message.content }} <|assistant_end|>{% endfor %}"
    )


def training(tokens: Path, **keys: object) -> dict[str, Any]:
    """The keys of a short training of the micro model."""
    return {
        "model": str(ROOT / "configs/models/apertus-micro.yaml"),
        "data": [{"tokens": str(tokens)}],
        "max_steps": 6,
        "global_batch_size": 8,
        "per_device_train_batch_size": 2,
        "sequence_length": 64,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "decay_steps": 2,
        "precision": "float32",
        "logging_steps": 1,
        "resume_steps": 2,
        "compile": "off",
        **keys,
    }
