"""Reads an open corpus, keeps some languages, and holds documents out for evaluation.

    python -m pretrain.corpus --config corpus.yaml

A held-out document never stands in the training split as well: where the same text does, it is dropped there.
"""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

from pydantic import Field, model_validator

from cordee import worker
from cordee.config import Config as BaseConfig
from cordee.config import Input
from cordee.cost import Cost
from cordee.errors import Stopped, UserError, nearest
from cordee.files import write_json
from cordee.stage import Context


class Config(BaseConfig):
    """What is read, what is kept, what is held out."""

    source: Input
    """A .parquet, .jsonl or .txt file with a column `text`, or a folder of such files."""
    languages: list[str] | None = Field(default=None, min_length=1)
    """Tags (BCP 47) of the languages to keep; all of them if not given."""
    holdout: dict[str, list[int | str]] = Field(default={})
    """Column → values; a document is held out if any of its columns has one of the values."""
    holdout_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of documents to hold out by a hash of text and seed, for corpora without such a column: 0 to 1."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> "Config":
        if bool(self.holdout) == bool(self.holdout_fraction):
            raise ValueError("give one of holdout and holdout_fraction")
        if empty := [column for column, values in self.holdout.items() if not values]:
            raise ValueError(f"holdout.{empty[0]} names no value")
        return self


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """Rows and tokens of the training split; tokens guessed from the size of the text."""
    del given
    from pretrain.data.estimate import training_rows_and_bytes
    from pretrain.data.reading import BYTES_PER_TOKEN

    rows, text_bytes = training_rows_and_bytes(config.source, config.languages, config.holdout)
    kept = 1 - config.holdout_fraction
    return Cost(tokens=text_bytes * kept / BYTES_PER_TOKEN, rows=None if rows is None else round(rows * kept))


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write `train.parquet`, `heldout.parquet` and `corpus.json`."""
    from pretrain.data.reading import find_files
    from pretrain.data.splits import Split, describe

    if skipped := find_files(config.source)[1]:
        context.note(f"{len(skipped)} other files in {config.source} are not read: {skipped[0].name} …")
    total, heldout_digests = _survey(config, context)
    context.out.mkdir(parents=True, exist_ok=True)
    train, heldout = Split(context.out / "train.parquet"), Split(context.out / "heldout.parquet")
    duplicates = 0
    for done, document in enumerate(item for item in _documents(config) if _is_kept(item, config)):
        _report(context, done, total)
        if _is_held_out(document, config, context.seed):
            heldout.add(document)
        elif _digest(document["text"]) in heldout_digests:
            duplicates += 1
        else:
            train.add(document)
    train.close()
    heldout.close()
    context.progress(total, total, "documents")
    if not train.documents:
        raise UserError("every training document's text is held out too", file=config.source, key="holdout")
    if duplicates:
        context.note(f"{duplicates} training documents dropped: their text is held out too")
    summary = describe(train, heldout)
    write_json(context.out / "corpus.json", summary)
    return {
        "rows": train.documents.total(),
        "heldout_rows": heldout.documents.total(),
        "train_bytes": train.bytes.total(),
        "heldout_bytes": heldout.bytes.total(),
        "languages": len(summary["languages"]),
        "duplicates_dropped": duplicates,
    }


def _survey(config: Config, context: Context) -> tuple[int, set[bytes]]:
    """Read everything once before anything is written: documents kept, and digests of what is held out."""
    tags: set[str] = set()
    unmatched = {(column, value) for column, values in config.holdout.items() for value in values}
    heldout_digests: set[bytes] = set()
    kept = heldout = 0
    for document in _documents(config):
        tags.add(document["language"])
        if not _is_kept(document, config):
            continue
        _report(context, kept, 0)
        kept += 1
        unmatched = {(column, value) for column, value in unmatched if document[column] != value}
        if _is_held_out(document, config, context.seed):
            heldout += 1
            heldout_digests.add(_digest(document["text"]))
    if not tags:
        raise UserError("holds no document", file=config.source, key="source")
    for tag in config.languages or []:
        if tag not in tags:
            raise UserError(f"no document is in {tag!r}", file=config.source, key="languages", hint=_near(tag, tags))
    for column, value in sorted(unmatched, key=str):
        raise UserError(f"no document has {column} = {value!r}", file=config.source, key=f"holdout.{column}")
    key = "holdout" if config.holdout else "holdout_fraction"
    if not heldout:
        raise UserError(f"holds out none of {kept} documents", file=config.source, key=key)
    if heldout == kept:
        raise UserError(f"holds out all {kept} documents, so none is left to train on", file=config.source, key=key)
    return kept, heldout_digests


def _near(tag: str, tags: set[str]) -> str:
    """A hint: the tag's own variants (`rm` → `rm-sursilv`), or else the most similar tag."""
    if variants := sorted(known for known in tags if known.startswith(f"{tag}-")):
        return f"there is {', '.join(variants)}"
    return nearest(tag, tags - {""}) if tags != {""} else "its documents have no language tag"


def _documents(config: Config) -> Iterator[dict[str, Any]]:
    from pretrain.data.reading import documents

    return documents(config.source, extra=tuple(config.holdout))


def _is_kept(document: dict[str, Any], config: Config) -> bool:
    return config.languages is None or document["language"] in config.languages


def _is_held_out(document: dict[str, Any], config: Config, seed: int) -> bool:
    """By its columns, or by a hash that depends on text and seed alone, so that the order does not matter."""
    if config.holdout:
        return any(document[column] in values for column, values in config.holdout.items())
    digest = blake2b(document["text"].encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest) < config.holdout_fraction * 2**64


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _report(context: Context, done: int, total: int) -> None:
    """Once in a while, say how far it is and see whether to stop."""
    if done % 1024:
        return
    if total:
        context.progress(done, total, "documents")
    if context.stop_requested():
        raise Stopped(f"stopped at document {done}; the next run reads the corpus again")


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
