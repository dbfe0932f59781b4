"""Documents to token ids, with the checks that no id is silently wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cordee.errors import Fault, UserError, nearest
from cordee.files import read_json
from pretrain.data.reading import batches, documents

CHECKED_EVERY = 16
"""One document in so many is decoded again and compared."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that takes every text as plain text, and the ids that stand round a document."""

    tokenizer: Tokenizer
    bos_token_id: int
    eos_token_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    """One more than the largest id."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest of little-endian uint16 and uint32 that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without any special token."""
        return [item.ids for item in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def load(folder: Path) -> Encoder:
    """Load the tokenizer of a folder.

    Raises:
        UserError: the folder holds no tokenizer, or its tokenizer names no bos or eos token.
    """
    file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    for needed in (file, config_file):
        if not needed.is_file():
            raise UserError(f"holds no {needed.name}", file=folder, key="tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no narrower type
        raise UserError(f"can't be read as a tokenizer: {error}", file=file, key="tokenizer") from error
    tokenizer.encode_special_tokens = True  # "</s>" in a document is text, not the end of a document
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    ids = {}
    for name in ("bos_token", "eos_token"):
        token = read_json(config_file).get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token not in vocabulary:
            hint = nearest(token, vocabulary) if token else ""
            raise UserError(f"{name} {token!r} is not in the vocabulary", file=config_file, key="tokenizer", hint=hint)
        ids[f"{name}_id"] = vocabulary[token]
    added = tokenizer.get_added_tokens_decoder()
    special_ids = tuple(sorted({*ids.values(), *(number for number, token in added.items() if token.special)}))
    return Encoder(tokenizer=tokenizer, special_ids=special_ids, vocab_size=max(vocabulary.values()) + 1, **ids)


def bytes_per_token(folder: Path, file: Path) -> float:
    """Bytes of UTF-8 that a token stands for, over the documents of a file."""
    encoder = load(folder)
    text_bytes = tokens = 0
    for batch in batches(documents(file, key="corpus")):
        texts = [document["text"] for document in batch]
        text_bytes += sum(len(text.encode()) for text in texts)
        tokens += sum(len(ids) for ids in encoder.encode(texts))
    return text_bytes / tokens


def check(encoder: Encoder, texts: Sequence[str], ids: Sequence[Sequence[int]], place: str, first: int) -> None:
    """See that no document holds a special token's id, and that a sample decodes to its text.

    Raises:
        Fault: one does not; names the document, counted from `first`.
    """
    for index, (text, text_ids) in enumerate(zip(texts, ids, strict=True)):
        row = f"{place}, row {first + index + 1}"
        if found := set(text_ids).intersection(encoder.special_ids):
            token = encoder.tokenizer.id_to_token(min(found))
            raise Fault(f"the tokenizer made the special token {token!r} out of text", file=row)
        if (first + index) % CHECKED_EVERY == 0:
            back = encoder.tokenizer.decode(text_ids, skip_special_tokens=False)
            if back != text:
                at = next((n for n, (a, b) in enumerate(zip(back, text, strict=False)) if a != b), len(back))
                problem = f"the tokenizer is not lossless: {text[at : at + 20]!r} came back as {back[at : at + 20]!r}"
                raise Fault(f"{problem} (character {at + 1})", file=row)
