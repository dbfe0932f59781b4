"""A Hugging Face model folder as it looks from outside, without torch: whether it is one, and how large."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cordee import files
from cordee.cost import Cost
from cordee.errors import Fault, UserError

LONGEST_HEADER = 100_000_000
"""Bytes: the limit of the safetensors format."""


def require(folder: Path, key: str | None = None) -> None:
    """Check that a folder is a model with weights.

    Raises:
        UserError: it is something else; says what.
        Fault: its config is damaged.
    """
    if not folder.is_dir():
        raise UserError("is no folder", file=folder, key=key)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError("is an adapter, not a model", file=folder, key=key, hint="merge it into its base first")
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"did you mean {folder.name}/{inside[-1]}?" if inside else ""
        raise UserError("is no Hugging Face model: it has no config.json", file=folder, key=key, hint=hint)
    if not isinstance(files.read_json(folder / "config.json"), dict):
        raise Fault("is no JSON object", file=folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        raise UserError("holds no weights: it has no *.safetensors", file=folder, key=key)


def cost(folder: Path, key: str, given: Mapping[str, Cost]) -> Cost:
    """What a plan knows of the model that a stage is given as `key`: what its stage told, or its files tell.

    Raises:
        UserError: it is neither made by a stage nor a model folder.
    """
    if key in given:
        return given[key]
    require(folder, key)
    config = files.read_json(folder / "config.json")
    shape = config.get("text_config", config)
    sizes = [_parameters(path) for path in folder.glob("model*.safetensors")]
    return Cost(parameters=sum(sizes) or None, vocab_size=shape.get("vocab_size"))


def _parameters(file: Path) -> int:
    """The numbers in a safetensors file, its few buffers among them.

    They follow from the header: eight bytes of length, then JSON with each tensor's shape.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(min(length, LONGEST_HEADER)))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Fault("is damaged: its header can't be read", file=file) from error
