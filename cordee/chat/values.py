"""Values of rows: without nulls, out of JSON text, whether they hold anything, and the texts in them.

Nulls are no values, at any depth: Parquet fills every struct with the keys of all the others (TRL's
`remove_none_values` does the same).
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from cordee.chat.problems import BadRowError


def without_nulls(value: Any) -> Any:
    """A value without the keys whose value is null, at any depth; nulls that are items of a list stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def from_text(value: Any, name: str, where: str = "") -> Any:
    """A value that may be JSON text; a blank text is None.

    Raises:
        BadRowError: it is a text that is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise BadRowError(f"{name} can't be read as JSON", where or str(error)) from error


def says(value: Any) -> bool:
    """Whether a value holds anything: text that is not blank, a number, a truth value, or a collection of these."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(says, value.values()))
    if isinstance(value, list):
        return any(map(says, value))
    return value is not None


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, keys of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (key, *texts_in(item))
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
