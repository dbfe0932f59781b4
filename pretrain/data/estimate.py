"""How large a source is, from its metadata and small columns alone: nothing of the text is read."""

import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from cordee.data import tables
from cordee.data.kinds import kind
from cordee.data.rows import COMPRESSION
from cordee.errors import UserError
from pretrain.data.reading import open_parquet
from pretrain.data.selection import Value


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
        tables.require_once(parquet.schema_arrow.names, file, "source")
        kept = _count(file, parquet.schema_arrow, languages, holdout)
        rows = None if rows is None or kept is None else rows + kept
        share = 1.0 if kept is None else kept / max(parquet.metadata.num_rows, 1)
        text_bytes += _text_bytes(parquet.metadata) * share
    return rows, text_bytes


def _count(
    file: Path, schema: pa.Schema, languages: Sequence[str] | None, holdout: Mapping[str, Sequence[Value]]
) -> int | None:
    """Rows of a Parquet file that are kept and not held out; None where Arrow can't compare the values."""
    try:
        conditions = [~_has(schema, column, values) for column, values in holdout.items()]
        conditions += [_has(schema, "language", languages)] if languages else []
        return int(
            ds.dataset(file, format="parquet").count_rows(
                filter=reduce(operator.and_, conditions) if conditions else None
            )
        )
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError):
        return None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"can't be read as Parquet: {error}", file=file, key="source") from error


def _has(schema: pa.Schema, column: str, values: Sequence[Value]) -> ds.Expression:
    """Whether a row's column has one of the values; no language is ""."""
    or_none = column == "language" and "" in values
    if column not in schema.names:
        return ds.scalar(or_none)
    return ds.field(column).isin([*values, None] if or_none else values)


def _text_bytes(metadata: pq.FileMetaData) -> int:
    """Bytes of the column `text` before compression."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
