"""Documents to token ids, with the checks that no id is silently wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cordee import model_folder
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import Fault, UserError, nearest
from pretrain.data.reading import batches, texts

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

    def comparable(self, text: str) -> str:
        """A text as its ids hold it: normalized, and without spaces in front, which SentencePiece adds and removes."""
        normalizer = self.tokenizer.normalizer
        return str(normalizer.normalize_str(text) if normalizer else text).lstrip(" ▁")


def load(folder: Path) -> Encoder:
    """The tokenizer of a folder, as training and evaluation open it; without a bos token, eos replaces it.

    Raises:
        UserError: the folder holds no tokenizer, its tokenizer names no eos token, or one that `tokenizer.json` lacks.
    """
    opened = open_tokenizer(folder, key="tokenizer")
    known = model_folder.vocabulary(folder)
    for name in ("bos_token", "eos_token"):
        token = getattr(opened, name)
        if token is None and name == "bos_token":
            continue
        if token not in known:  # transformers adds a token that is named and not there
            hint = nearest(token, known) if token else ""
            file = folder / "tokenizer_config.json"
            raise UserError(f"{name} {token!r} is not in the vocabulary", file=file, key="tokenizer", hint=hint)
    tokenizer: Tokenizer = opened.backend_tokenizer
    tokenizer.encode_special_tokens = True  # "</s>" in a document is text, not the end of a document
    tokenizer.no_truncation()
    tokenizer.no_padding()
    begin, end = opened.bos_token_id, opened.eos_token_id
    begin = end if begin is None else begin
    added = tokenizer.get_added_tokens_decoder()
    special_ids = {begin, end, *(number for number, token in added.items() if token.special)}
    vocab_size = max(opened.get_vocab().values()) + 1
    return Encoder(tokenizer, begin, end, tuple(sorted(special_ids)), vocab_size)


def bytes_per_token(folder: Path, file: Path) -> float:
    """UTF-8 bytes per token, over the documents of a file."""
    encoder = load(folder)
    text_bytes = tokens = 0
    for batch in batches(texts(file)):
        text_bytes += sum(len(text.encode()) for text in batch)
        tokens += sum(len(ids) for ids in encoder.encode(batch))
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
            if encoder.comparable(back) != encoder.comparable(text):
                at = next((n for n, (a, b) in enumerate(zip(back, text, strict=False)) if a != b), len(back))
                problem = f"the tokenizer is not lossless: {text[at : at + 20]!r} came back as {back[at : at + 20]!r}"
                raise Fault(f"{problem} (character {at + 1})", file=row)
