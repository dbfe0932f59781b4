"""How large a source is, from its metadata and small columns alone: nothing of the text is read."""

import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds

from cordee.errors import UserError
from pretrain.data.reading import find_files, open_parquet


def training_rows_and_bytes(
    source: Path, languages: Sequence[str] | None, holdout: Mapping[str, Sequence[int | str]]
) -> tuple[int | None, float]:
    """Rows (None where they would have to be read) and bytes of text that are kept and not held out.

    Raises:
        UserError: a file can't be read, or has no such column.
    """
    conditions = [~ds.field(column).isin(values) for column, values in holdout.items()]
    conditions += [ds.field("language").isin(languages)] if languages else []
    condition = reduce(operator.and_, conditions) if conditions else None
    rows: int | None = 0
    text_bytes = 0.0
    for file in find_files(source)[0]:
        if file.suffix != ".parquet":
            rows, text_bytes = None, text_bytes + file.stat().st_size
            continue
        metadata = open_parquet(file, "source").metadata
        try:
            kept = ds.dataset(file, format="parquet").count_rows(filter=condition)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"can't be filtered: {error}", file=file, key="source") from error
        rows = None if rows is None else rows + kept
        text_bytes += _text_bytes(metadata) * kept / max(metadata.num_rows, 1)
    return rows, text_bytes


def _text_bytes(metadata: pa.parquet.FileMetaData) -> int:
    """Bytes of the column `text` before compression."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
