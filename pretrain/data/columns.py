"""The types of the columns that a corpus carries besides `text`, found while it is read.

Each column keeps its own type: Arrow's where the files have one, else what Arrow finds in JSON's values, widened until
it holds those of every file. A column that no one type holds (a number here and a text there, integers beyond 64 bits,
objects without keys or with hundreds of them) is written as JSON text, null where the value is.
"""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.data.reading import Chunk, Column, values_of

Types = dict[str, pa.DataType | None]
"""Column → its type, or None where it becomes JSON text."""

MOST_FIELDS = 256
"""Above, an object's keys are data, not a schema."""

REFUSED = (pa.ArrowException, OverflowError, TypeError, ValueError)
"""What Arrow raises for values that it can't hold."""


class MisfitColumnError(ValueError):
    """A column whose values its type does not hold after all."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def widen(types: Types, chunk: Chunk) -> None:
    """Have the types hold a chunk's columns too, in place."""
    for name, column in chunk.columns.items():
        known = types.get(name, pa.null())
        if known is not None:
            types[name] = _both(known, _type(column))


def settle(types: Types) -> Types:
    """The types as they are written, when all was seen: what Parquet can't hold becomes JSON text."""
    return {name: kind if kind is not None and _is_held(kind) else None for name, kind in types.items()}


def schema(types: Types) -> pa.Schema:
    """The schema of a corpus's files: `text`, then the columns that are carried."""
    carried = [(name, pa.string() if kind is None else kind) for name, kind in types.items()]
    return pa.schema([("text", pa.string()), *carried])


def table(chunk: Chunk, types: Types) -> pa.Table:
    """A chunk in these types.

    Raises:
        MisfitColumnError: a column does not fit its type, as where an integer beyond 2^53 meets a float.
    """
    arrays = [_array(name, chunk.columns.get(name, [None] * len(chunk.texts)), kind) for name, kind in types.items()]
    return pa.table([pa.array(chunk.texts, pa.string()), *arrays], schema=schema(types))


def described(types: Types) -> dict[str, str]:
    """Column → the name of its type."""
    return {name: "JSON text" if kind is None else str(kind) for name, kind in types.items()}


def _type(column: Column) -> pa.DataType | None:
    """The type of a column, or None where it has no single one."""
    if not isinstance(column, list):
        return column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    try:
        return pa.array(column).type
    except REFUSED:
        return None


def _both(one: pa.DataType, other: pa.DataType | None) -> pa.DataType | None:
    """The type that holds the values of both, or None."""
    if other is None or one == other:
        return other
    schemas = [pa.schema([("column", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field("column").type
    except pa.ArrowException:
        return None


def _is_held(kind: pa.DataType) -> bool:
    """Whether Parquet has such a type, of a reasonable size."""
    try:
        pq.write_table(pa.schema([("column", kind)]).empty_table(), pa.BufferOutputStream())
    except pa.ArrowException:
        return False
    return _num_fields(kind) <= MOST_FIELDS


def _num_fields(kind: pa.DataType) -> int:
    return 1 + sum(_num_fields(kind.field(index).type) for index in range(kind.num_fields))


def _array(name: str, column: Column, kind: pa.DataType | None) -> pa.Array:
    if kind is None:
        return pa.array([None if value is None else _json(value) for value in values_of(column)], pa.string())
    try:
        return pa.array(column, kind) if isinstance(column, list) else column.cast(kind)
    except REFUSED as error:
        raise MisfitColumnError(name) from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """A value that JSON lacks (a date, bytes, a decimal) as text."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
