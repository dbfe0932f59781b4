"""Encodes a corpus into files of token ids, which training maps into memory.

    python -m pretrain.tokens --config tokens.yaml

Each document stands between the tokenizer's bos and eos tokens; where it has no bos, eos stands on both sides.
Text that spells a special token is encoded as the characters that it is.
"""

import json
import time
from array import array
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cordee import model_folder, worker
from cordee.config import Config as BaseConfig
from cordee.config import Input
from cordee.cost import Cost
from cordee.files import read_json, write_json, write_text
from cordee.stage import Context

if TYPE_CHECKING:
    from pretrain.data.encoding import Encoder


VERSION = 1


class Config(BaseConfig):
    """What is encoded, and with what."""

    corpus: Input
    """A corpus: its `train.parquet` and `heldout.parquet`."""
    tokenizer: Input
    """A tokenizer: a folder with `tokenizer.json` and `tokenizer_config.json`, a model's too."""


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """Tokens of the training split: from the corpus's own count of bytes where there is one."""
    from pretrain.data.reading import BYTES_PER_TOKEN

    corpus, tokenizer = given.get("corpus", Cost()), given.get("tokenizer", Cost())
    tokens, rows, vocab_size = corpus.tokens, corpus.rows, tokenizer.vocab_size
    if (summary := config.corpus / "corpus.json").is_file():
        languages = read_json(summary)["languages"].values()
        rows = sum(language["train_documents"] for language in languages)
        tokens = sum(language["train_bytes"] for language in languages) / BYTES_PER_TOKEN + 2 * rows
    if vocab_size is None and (config.tokenizer / "tokenizer.json").is_file():
        vocab_size = max(model_folder.vocabulary(config.tokenizer).values()) + 1
    return Cost(tokens=tokens, rows=rows, vocab_size=vocab_size)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write the ids and offsets of both splits, `tokens.json`, and a copy of the tokenizer."""
    from cordee.compute.tokenizer import copy_tokenizer
    from pretrain.data.encoding import load
    from pretrain.data.reading import num_rows, split_file

    encoder = load(config.tokenizer)
    files = {split: split_file(config.corpus, split) for split in ("train", "heldout")}
    rows = {split: num_rows(file) for split, file in files.items()}
    total = sum(rows.values())
    context.out.mkdir(parents=True, exist_ok=True)
    train_tokens, train_bytes = _write_split(files["train"], encoder, context, 0, total)
    heldout_tokens, heldout_bytes = _write_split(files["heldout"], encoder, context, rows["train"], total)
    (context.out / "tokenizer").mkdir(exist_ok=True)
    copy_tokenizer(config.tokenizer, context.out / "tokenizer")
    counts = {
        "vocab_size": encoder.vocab_size,
        "train_tokens": train_tokens.total(),
        "heldout_tokens": heldout_tokens.total(),
        "train_bytes": train_bytes,
        "heldout_bytes": heldout_bytes,
    }
    special = {"bos_token_id": encoder.bos_token_id, "eos_token_id": encoder.eos_token_id}
    by_language = {"train_tokens_by_language": dict(sorted(train_tokens.items()))}
    write_json(context.out / "tokens.json", {"dtype": encoder.dtype.name, **counts, **special, **by_language})
    return {"tokens": counts["train_tokens"], "rows": rows["train"], **counts}


def _write_split(file: Path, encoder: "Encoder", context: Context, before: int, total: int) -> tuple[Counter[str], int]:
    """Encode one split, after `before` of `total` documents; returns its tokens by language and its bytes of text."""
    import numpy as np

    from pretrain.data.encoding import check
    from pretrain.data.reading import batches, documents

    split, start = file.stem, time.monotonic()
    offsets, tokens, text_bytes, lines = array("q", [0]), Counter[str](), 0, []
    with (context.out / f"{split}.bin").open("wb") as ids_file:
        for batch in batches(documents(file)):
            done = before + len(offsets) - 1
            context.stop_if_asked(f"document {done} of {total}")
            texts = [document["text"] for document in batch]
            ids = encoder.encode(texts)
            check(encoder, texts, ids, str(file), len(offsets) - 1)
            for document, document_ids in zip(batch, ids, strict=True):
                whole = [encoder.bos_token_id, *document_ids, encoder.eos_token_id]
                ids_file.write(np.array(whole, dtype=encoder.dtype).tobytes())
                offsets.append(offsets[-1] + len(whole))
                tokens[document["language"]] += len(whole)
                size = len(document["text"].encode())
                text_bytes += size
                if split == "heldout":
                    lines.append(json.dumps({"language": document["language"], "bytes": size}) + "\n")
            rate = offsets[-1] / max(time.monotonic() - start, 1e-9)
            context.progress(done + len(batch), total, "documents", tokens_per_s=rate)
    np.save(context.out / f"{split}.offsets.npy", np.array(offsets, dtype=np.int64))
    if split == "heldout":
        write_text(context.out / "heldout.documents.jsonl", "".join(lines))
    return tokens, text_bytes


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
