"""Tokens made by hand: documents of random ids in the format of `pretrain.tokens`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

VOCAB_SIZE = 512
BOS, EOS, PAD = 0, 1, 2
LANGUAGES = ("de-CH", "rm", "fr-CH")


def write_tokens(folder: Path, lengths: Sequence[int], heldout: Sequence[int] = (9, 30, 17, 12), seed: int = 0) -> Path:
    """A tokens artifact whose documents have these lengths, `<s>` and `</s>` counted."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for split, sizes in (("train", lengths), ("heldout", heldout)):
        documents = [np.array([BOS, *rng.integers(3, VOCAB_SIZE, size - 2), EOS], dtype="<u2") for size in sizes]
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
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")


@pytest.fixture
def make_tokens(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tokens artifact: `make_tokens("a", [5, 9])`."""
    return lambda name, lengths, **options: write_tokens(tmp_path / name, lengths, **options)
