"""Folders of documents for the tests of the corpus stage, the stage run on them, and what it says."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cordee.errors import UserError
from cordee.stage import Context
from pretrain.corpus import Config, run


def lines(documents):
    return "".join(json.dumps(item) + "\n" for item in documents).encode()


def documents(first=0, count=20, **columns):
    return [{"text": f"Document {index} tells of something.", **columns} for index in range(first, first + count)]


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else lines(content))
    return folder


def build(tmp_path, source, **keys):
    config = Config.model_validate({"source": str(source), "holdout_fraction": 0.3, **keys})
    out = tmp_path / "out"
    tmp_path.mkdir(exist_ok=True)
    metrics = run(config, Context(out=out, seed=1, events=tmp_path / "events.jsonl"))
    table = pa.concat_tables([pq.read_table(out / f"{split}.parquet") for split in ("train", "heldout")])
    return metrics, table, json.loads((out / "corpus.json").read_text())


def notes(tmp_path):
    rows = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    return [row["text"] for row in rows if row["event"] == "note"]


def error_of(tmp_path, source, **keys):
    with pytest.raises(UserError) as caught:
        build(tmp_path, source, **keys)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    return str(caught.value)
