"""How large a source is, from its metadata and small columns alone: nothing of the text is read."""

import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from cordee.errors import UserError
from pretrain.data.folder import kind
from pretrain.data.reading import open_parquet
from pretrain.data.selection import Value

COMPRESSION = 3.0
"""How many times larger compressed text is taken to be."""


def training_rows_and_bytes(
    files: Sequence[Path], languages: Sequence[str] | None, holdout: Mapping[str, Sequence[Value]]
) -> tuple[int | None, float]:
    """Rows (None where they would have to be read) and bytes of text that are kept and not held out.

    Raises:
        UserError: a file can't be read.
    """
    rows: int | None = 0
    text_bytes = 0.0
    for file in files:
        suffix, codec = kind(file)
        if suffix != ".parquet":
            rows, text_bytes = None, text_bytes + file.stat().st_size * (COMPRESSION if codec else 1)
            continue
        parquet = open_parquet(file, "source")
        kept = _count(file, parquet.schema_arrow, languages, holdout)
        rows = None if rows is None or kept is None else rows + kept
        share = 1.0 if kept is None else kept / max(parquet.metadata.num_rows, 1)
        text_bytes += _text_bytes(parquet.metadata) * share
    return rows, text_bytes


def _count(
    file: Path, schema: pa.Schema, languages: Sequence[str] | None, holdout: Mapping[str, Sequence[Value]]
) -> int | None:
    """Rows of a Parquet file that are kept and not held out; None where Arrow can't compare a column's type."""
    conditions = [~ds.field(column).isin(values) for column, values in holdout.items() if column in schema.names]
    conditions += [ds.field("language").isin(languages)] if languages and "language" in schema.names else []
    try:
        return int(
            ds.dataset(file, format="parquet").count_rows(
                filter=reduce(operator.and_, conditions) if conditions else None
            )
        )
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError):
        return None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"can't be read as Parquet: {error}", file=file, key="source") from error


def _text_bytes(metadata: pq.FileMetaData) -> int:
    """Bytes of the column `text` before compression."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
