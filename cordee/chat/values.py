"""Values of rows: without nulls, out of JSON text, whether they hold anything, and the texts in them.

Nulls are no values, at any depth: Parquet fills every struct with the keys of all the others (TRL's
`remove_none_values` does the same).
"""

import json
import math
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


def number(values: Mapping[str, Any], name: str) -> float | None:
    """A column's number; a text that spells one, as CSV has it, is one; None where there is none.

    Raises:
        BadRowError: it holds something else.
    """
    value = values.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        found = float(value) if isinstance(value, int | float | str) else math.inf
    except ValueError:
        found = math.inf
    if not math.isfinite(found):
        raise BadRowError(f"{name} is no number", f"{value!r:.60}")
    return found


def numbers(values: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """A column's numbers, of which there may be none.

    Raises:
        BadRowError: it holds something else.
    """
    found = from_text(values.get(name), name)
    if found is None:
        return ()
    if not isinstance(found, list):
        raise BadRowError(f"{name} is no list of numbers", f"{found!r:.60}")
    listed = [number({name: item}, name) for item in found]
    told = tuple(item for item in listed if item is not None)
    if len(told) < len(listed):
        raise BadRowError(f"{name} holds an item that is no number")
    return told


def truth(values: Mapping[str, Any], name: str) -> float | None:
    """A column's truth value as 1 or 0: `true`, `false`, 1 or 0, or a text of one; None where there is none.

    Raises:
        BadRowError: it holds something else.
    """
    value = values.get(name)
    told = str(value).strip().lower() if value is not None else ""
    if told in ("", "nan"):
        return None
    if told not in ("true", "false", "1", "0", "1.0", "0.0"):
        raise BadRowError(f"{name} is neither true nor false", f"{value!r:.60}")
    return float(told in ("true", "1", "1.0"))
