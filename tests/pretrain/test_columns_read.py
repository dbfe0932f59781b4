"""Stages that use a corpus read the columns that they use; what else it carries can't stop them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cordee.errors import UserError
from cordee.stage import Context
from pretrain import corpus, tokenizer, tokens
from pretrain.data import reading

WORDS = "Tuots umauns naschan libers ed eguels in dignità e drets"
DOCUMENTS = 300


def overwrite(file, column):
    """Fill a column's pages with zeros: who reads it ends with an error."""
    content, metadata = bytearray(file.read_bytes()), pq.read_metadata(file)
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(metadata.schema.names.index(column))
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    file.write_bytes(content)
    with pytest.raises(OSError, match="deserialize"):
        pq.read_table(file, columns=[column])


def split(folder, name="train", **columns):
    """A split of a corpus with these columns besides `text` and `language`."""
    folder.mkdir(exist_ok=True)
    texts = [f"{WORDS} {number}" for number in range(DOCUMENTS)]
    table = pa.table({"text": texts, "language": ["de", "rm", None] * (DOCUMENTS // 3)})
    for column, values in columns.items():
        table = table.append_column(column, pa.array(values))
    pq.write_table(table, folder / f"{name}.parquet")
    return folder / f"{name}.parquet"


def run(stage, out, **keys):
    config = stage.Config.model_validate(
        {name: value if name == "vocab_size" else str(value) for name, value in keys.items()}
    )
    return stage.run(config, Context(out=out, seed=0, events=out.parent / "events.jsonl"))


def strange(values):
    """Text that is not UTF-8."""
    return pa.array([value.encode("latin-1") for value in values], pa.binary()).view(pa.string())


def test_tokenizer_and_tokens_read_no_column_that_they_do_not_use(tmp_path):
    carried = {"page": ["<html>" * 100] * DOCUMENTS, "title": strange(["Zürich"] * DOCUMENTS)}
    for name in ("train", "heldout"):
        overwrite(split(tmp_path / "corpus", name, **carried), "page")
    run(tokenizer, tmp_path / "tokenizer", corpus=tmp_path / "corpus", vocab_size=270)
    metrics = run(tokens, tmp_path / "tokens", corpus=tmp_path / "corpus", tokenizer=tmp_path / "tokenizer")
    assert metrics["rows"] == DOCUMENTS
    by_language = json.loads((tmp_path / "tokens" / "tokens.json").read_text())["train_tokens_by_language"]
    assert list(by_language) == ["", "de", "rm"]


def test_the_tokenizer_reads_text_alone(tmp_path):
    for name in ("train", "heldout"):
        overwrite(split(tmp_path / "corpus", name), "language")
    assert run(tokenizer, tmp_path / "out", corpus=tmp_path / "corpus", vocab_size=270)["vocab_size"] == 270


def test_a_cost_reads_the_columns_of_the_selection_alone(tmp_path):
    file = split(tmp_path / "c", article=[number % 10 for number in range(DOCUMENTS)], page=["<html>"] * DOCUMENTS)
    for column in ("text", "page"):
        overwrite(file, column)
    keys = {"source": str(file), "holdout": {"article": [9]}, "languages": ["de"]}
    assert corpus.cost(corpus.Config.model_validate(keys), {}).rows == 90


def test_a_cost_does_without_rows_where_arrow_can_not_compare_the_values(tmp_path):
    file = split(tmp_path / "c", article=[number % 10 for number in range(DOCUMENTS)])
    for values in ([9, "x"], ["x"]):
        keys = {"source": str(file), "holdout": {"article": values}}
        assert corpus.cost(corpus.Config.model_validate(keys), {}).rows is None


def test_a_name_that_two_columns_have_matters_where_the_column_is_used(tmp_path):
    file = split(tmp_path / "c", page=["a"] * DOCUMENTS)
    table = pq.read_table(file)
    pq.write_table(table.append_column("page", table["page"]), file)
    assert len(list(reading.documents(file))) == reading.num_rows(file) == DOCUMENTS
    with pytest.raises(UserError, match="source: has two columns 'page'"):
        list(reading.chunks(file))
    pq.write_table(table.append_column("language", table["page"]), file)
    assert len(list(reading.texts(file))) == DOCUMENTS
    with pytest.raises(UserError, match="corpus: has two columns 'language'"):
        list(reading.documents(file))


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl"])
def test_a_chunk_of_any_kind_of_file_holds_the_columns_asked_for(tmp_path, suffix):
    rows = [{"text": "a", "language": "de", "page": 1}, {"text": "b", "language": None, "page": 2}]
    table, file = pa.Table.from_pylist(rows), tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, file)
    elif suffix == "arrow":
        with pa.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for columns, held in ((None, {"language", "page"}), (("language", "other"), {"language"}), ((), set())):
        (chunk,) = reading.chunks(file, columns=columns)
        assert set(chunk.columns) == held
        assert chunk.texts == ["a", "b"]
