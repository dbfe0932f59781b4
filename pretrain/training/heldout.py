"""Bits per byte of held-out documents, by language: comparable between models, whatever their tokenizers.

Each token of a document's text counts once, given the token that begins a document and the text before it; the token
that ends a document does not count. The benchmark `heldout_bits_per_byte` counts the same tokens. A document longer
than `sequence_length` is read in parts that do not see each other, which begin with the last token of the part before.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from cordee import files
from cordee.compute.device import is_sharded
from cordee.errors import Fault
from pretrain.data.loader import Row, Split, assemble
from pretrain.training.model import Objective


@dataclass(frozen=True)
class Heldout:
    """The held-out documents of all sources."""

    splits: tuple[Split, ...]
    languages: tuple[tuple[str, ...], ...]
    """For each source, the language of each document."""
    sizes: tuple[np.ndarray, ...]
    """For each source, the UTF-8 bytes of each document."""
    rows: tuple[tuple[int, Row], ...]
    """Every row, with its source."""
    eos_token_id: int
    """Ends each document, and stands nowhere in its text."""


def open_heldout(splits: Sequence[Split], folders: Sequence[Path]) -> Heldout:
    """Join the held-out splits of several tokens artifacts with the language and size of each document.

    Raises:
        Fault: an artifact lists more or fewer documents than it holds.
    """
    languages, sizes, rows = [], [], []
    for source, (split, folder) in enumerate(zip(splits, folders, strict=True)):
        documents = files.read_json_lines(folder / "heldout.documents.jsonl")
        if len(documents) != len(np.unique(split.documents)):
            raise Fault("it does not list each held-out document", file=folder / "heldout.documents.jsonl")
        languages.append(tuple(document["language"] for document in documents))
        sizes.append(np.array([document["bytes"] for document in documents], dtype=np.int64))
        pieces, order = split.epoch(None)
        rows += [(source, pieces[split.rows[row]]) for row in order]
    eos_token_id = int(files.read_json(folders[0] / "tokens.json")["eos_token_id"])
    return Heldout(tuple(splits), tuple(languages), tuple(sizes), tuple(rows), eos_token_id)


def measure(
    heldout: Heldout,
    objective: Objective,
    accelerator: Accelerator,
    batch_shape: tuple[int, int],
    stopping: Callable[[], bool],
) -> dict[str, Any] | None:
    """Held-out nats by document, summed to bits per byte by language; None where a stop was asked for.

    Documents are packed as in training and batches have its shape, so that the compiled code of training is used.
    Gradients then stay enabled, and so does the training mode unless it draws random numbers: turning either off would
    compile a second time.

    Args:
        heldout: the documents.
        objective: not wrapped by DDP.
        accelerator: its processes share the work.
        batch_shape: rows in a batch and tokens in a row.
        stopping: asked before each batch, in every process.

    Returns:
        `bits_per_byte`, `documents`, `bytes` and `by_language` with the same by BCP 47 tag.
    """
    at_once = batch_shape[0] * accelerator.num_processes
    nats = [np.zeros(len(sizes)) for sizes in heldout.sizes]
    objective.train(objective.is_compiled and not objective.is_random)
    for start in range(0, len(heldout.rows), at_once):
        if stopping():
            objective.train()
            return None
        rows = heldout.rows[start : start + at_once][accelerator.process_index :: accelerator.num_processes]
        batch = assemble([(heldout.splits[source], row) for source, row in rows], *batch_shape, objective.pad_token_id)
        with torch.set_grad_enabled(objective.is_compiled and not is_sharded(objective)):
            _, _, nats_by_token = objective(*batch.to(accelerator.device))
            by_token = nats_by_token.double().cpu().masked_fill(batch.labels == heldout.eos_token_id, 0.0)
        for (source, row), line in zip(rows, by_token.numpy(), strict=False):
            begins = np.cumsum(heldout.splits[source].lengths[row]) - heldout.splits[source].lengths[row]
            np.add.at(nats[source], heldout.splits[source].documents[row], np.add.reduceat(line, begins))
    objective.train()
    summed = torch.from_numpy(np.concatenate(nats)).to(accelerator.device)
    return _by_language(heldout, accelerator.reduce(summed, "sum").cpu().numpy())


def _by_language(heldout: Heldout, nats: np.ndarray) -> dict[str, Any]:
    """Sum the cost of each document, overall and by language."""
    bits, sizes, documents = Counter[str](), Counter[str](), Counter[str]()
    languages = [language for source in heldout.languages for language in source]
    for language, cost, size in zip(languages, nats.tolist(), np.concatenate(heldout.sizes).tolist(), strict=True):
        bits[language] += cost / math.log(2)
        sizes[language] += size
        documents[language] += 1
    return {
        "bits_per_byte": bits.total() / sizes.total(),
        "documents": documents.total(),
        "bytes": sizes.total(),
        "by_language": {
            tag: {"bits_per_byte": bits[tag] / sizes[tag], "documents": documents[tag], "bytes": sizes[tag]}
            for tag in sorted(sizes)
        },
    }
