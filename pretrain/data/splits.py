"""Writes one split of a corpus as Parquet, and counts its languages and licences."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cordee.stage import Context
from pretrain.data import columns
from pretrain.data.columns import Types
from pretrain.data.reading import chunks, words
from pretrain.data.selection import Selection
from pretrain.data.survey import Digests, Survey, are_in

ROW_GROUP_BYTES = 32 * 2**20
ROW_GROUP_ROWS = 10_000
COUNTED = ("language", "licence", "source", "language_name", "script")
"""Columns that are counted where a corpus has them."""


class Split:
    """Writes one Parquet file, in row groups of a bounded size, and counts as it writes."""

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        self.documents: Counter[str] = Counter()
        """Documents of each language's tag."""
        self.bytes: Counter[str] = Counter()
        """Bytes of UTF-8 of each language's tag."""
        self.licences: Counter[str] = Counter()
        self.names: dict[str, tuple[str, str]] = {}
        """Name and script of each language's tag; both "" for documents without a language, whose tag is ""."""
        self.sources = Digests()
        self.byte_counts = np.zeros(256, dtype=np.int64)
        self._schema = schema
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = self._waiting_rows = 0

    def add(self, documents: pa.Table) -> None:
        """Write some documents."""
        texts = [text.encode() for text in documents["text"].to_pylist()]
        counted = {name: self._words(documents, name) for name in COUNTED}
        for text, tag, licence, name, script in zip(
            texts, *(counted[name] for name in ("language", "licence", "language_name", "script")), strict=True
        ):
            self.documents[tag] += 1
            self.bytes[tag] += len(text)
            self.licences[licence or "not stated"] += 1
            self.names.setdefault(tag, (name, script) if tag else ("", ""))
        self.byte_counts += np.bincount(np.frombuffer(b"".join(texts), dtype=np.uint8), minlength=256)
        self.sources.add(source for source in counted["source"] if source)
        self._waiting.append(documents)
        self._waiting_bytes += documents.nbytes
        self._waiting_rows += len(texts)
        if self._waiting_bytes >= ROW_GROUP_BYTES or self._waiting_rows >= ROW_GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is left and the file's end."""
        if self._waiting:
            self._flush()
        self._writer.close()

    def _words(self, documents: pa.Table, name: str) -> list[str]:
        """A column as it is counted by; "" for each document where there is none."""
        has = name in self._schema.names
        return words(documents[name].to_pylist() if has else [None] * documents.num_rows)

    def _flush(self) -> None:
        self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks())
        self._waiting, self._waiting_bytes, self._waiting_rows = [], 0, 0


def write(survey: Survey, selection: Selection, context: Context) -> tuple[Split, Split, Types]:
    """Read the files again and write `train.parquet` and `heldout.parquet`.

    Returns:
        both splits, and the types of the columns as they were written.

    Raises:
        Stopped: a stop was asked for.
    """
    types = columns.settle(survey.types)
    while True:
        try:
            return *_write_as(types, survey, selection, context), types
        except columns.MisfitColumnError as error:
            types = {**types, error.name: None}


def _write_as(types: Types, survey: Survey, selection: Selection, context: Context) -> tuple[Split, Split]:
    """Write both splits with columns of these types.

    Raises:
        MisfitColumnError: a column's values do not fit its type.
    """
    schema, heldout_texts = columns.schema(types), np.unique(survey.heldout.numbers())
    train, heldout = (Split(context.out / f"{name}.parquet", schema) for name in ("train", "heldout"))
    done, total, told_s = 0, len(survey.texts), 0.0
    for chunk in (selection.kept(chunk) for file in survey.files for chunk in chunks(file)):
        table = columns.table(chunk, types)
        heldout.add(table.filter(pa.array(selection.are_held_out(chunk), pa.bool_())))
        train.add(table.filter(pa.array(~are_in(Digests(chunk.texts).numbers(), heldout_texts))))
        done += len(chunk.texts)
        context.stop_if_asked(f"document {done}")
        if (now := time.monotonic()) - told_s >= 1 or done == total:
            told_s = now
            context.progress(done, total, "documents")
    train.close()
    heldout.close()
    return train, heldout


def describe(train: Split, heldout: Split) -> dict[str, Any]:
    """What `corpus.json` says of both sides."""
    tags = sorted({*train.documents, *heldout.documents})
    names = {**heldout.names, **train.names}
    shares = heldout.byte_counts[heldout.byte_counts > 0] / heldout.byte_counts.sum()
    return {
        "languages": {
            tag: {
                "name": names[tag][0],
                "script": names[tag][1],
                "train_documents": train.documents[tag],
                "train_bytes": train.bytes[tag],
                "heldout_documents": heldout.documents[tag],
                "heldout_bytes": heldout.bytes[tag],
            }
            for tag in tags
        },
        "licences": dict(sorted((train.licences + heldout.licences).items())),
        "sources": len(np.unique(np.concatenate([train.sources.numbers(), heldout.sources.numbers()]))),
        "heldout_byte_entropy": float(-(shares * np.log2(shares)).sum()),
    }
