"""One side of a corpus as it is written: its documents in Parquet, and what there is of each language and licence."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.data.reading import SCHEMA, Document

ROW_GROUP_BYTES = 32 * 2**20
ROW_GROUP_ROWS = 10_000


class Split:
    """Writes one Parquet file, in row groups of a bounded size, and counts as it writes."""

    def __init__(self, file: Path) -> None:
        self.documents: Counter[str] = Counter()
        """Documents of each language's tag."""
        self.bytes: Counter[str] = Counter()
        """Bytes of UTF-8 of each language's tag."""
        self.licences: Counter[str] = Counter()
        self.names: dict[str, tuple[str, str]] = {}
        """Name and script of each language's tag."""
        self.sources: set[int] = set()
        """Hashes of the sources, which are only counted."""
        self.byte_counts = np.zeros(256, dtype=np.int64)
        self._writer = pq.ParquetWriter(file, SCHEMA, compression="zstd")
        self._waiting: list[Document] = []
        self._waiting_bytes = 0

    def add(self, document: Document) -> None:
        """Write one document."""
        text, tag = document["text"].encode(), document["language"]
        self.documents[tag] += 1
        self.bytes[tag] += len(text)
        self.licences[document["licence"] or "not stated"] += 1
        self.names.setdefault(tag, (document["language_name"], document["script"]))
        self.sources.add(hash(document["source"]))
        self.byte_counts += np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
        self._waiting.append(document)
        self._waiting_bytes += len(text)
        if self._waiting_bytes >= ROW_GROUP_BYTES or len(self._waiting) >= ROW_GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is left and the file's end."""
        if self._waiting:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._waiting, schema=SCHEMA))
        self._waiting, self._waiting_bytes = [], 0


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
        "sources": len(train.sources | heldout.sources),
        "heldout_byte_entropy": float(-(shares * np.log2(shares)).sum()),
    }
