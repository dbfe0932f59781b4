"""The kinds of data files, by the suffixes of their names."""

from pathlib import Path

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Suffix → pyarrow's name of the codec."""

TABLES = (".parquet", ".arrow")
DELIMITED = (".csv", ".tsv")
LINES = (".jsonl", ".ndjson", ".json", *DELIMITED, ".txt")
"""Those that may be compressed."""
KINDS = (*TABLES, *LINES)


def kind(file: Path) -> tuple[str, str | None]:
    """The suffix that says how a file is read (one of `KINDS`, or ""), and its codec where it is compressed."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in file.suffixes)]
    codec = COMPRESSIONS.get(last)
    suffix = before if codec else last
    return (suffix if suffix in (LINES if codec else KINDS) else ""), codec
