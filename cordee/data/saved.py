"""Data sets that the library `datasets` wrote with `save_to_disk`."""

import json
from pathlib import Path
from typing import Any

from cordee import files
from cordee.errors import UserError

STATE, INFO, DICT = "state.json", "dataset_info.json", "dataset_dict.json"


def data_files(folder: Path) -> list[Path] | None:
    """The files of a saved `Dataset` in the order of its rows, or None where the folder is none.

    Raises:
        UserError: its state can't be read, one of its files is missing, or it is a selection of rows by an index.
    """
    if not (folder / STATE).is_file() or not (folder / INFO).is_file():
        return None
    state = _read(folder / STATE)
    try:
        names = [files.inside(str(item["filename"])) for item in state["_data_files"]]
        indices = [str(item["filename"]) for item in state.get("_indices_data_files") or []]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError("names no data files", file=folder / STATE) from error
    except ValueError as error:
        raise UserError(str(error), file=folder / STATE, key="_data_files") from error
    if indices:
        problem = f"the rows are chosen and ordered by {indices[0]}, which is not read"
        hint = "load it with datasets, and save what flatten_indices() gives"
        raise UserError(problem, file=folder / STATE, key="_indices_data_files", hint=hint)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"there is no {missing[0]}", file=folder / STATE, key="_data_files")
    return [folder / name for name in names]


def splits(folder: Path) -> list[str]:
    """The splits of a saved `DatasetDict`, each a folder below; none where the folder is no such thing.

    Raises:
        UserError: the list of them can't be read.
    """
    if not (folder / DICT).is_file():
        return []
    found = _read(folder / DICT)
    if not isinstance(found, dict) or not isinstance(found.get("splits"), list):
        raise UserError("names no splits", file=folder / DICT)
    return [str(split) for split in found["splits"]]


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"can't be read as JSON: {error}", file=file) from error
