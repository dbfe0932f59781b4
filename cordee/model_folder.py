"""Hugging Face model folders without torch: whether a folder is one, whether it is damaged, and its size."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cordee import files, hashes, manifest
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
        found = [*folder.glob("*/config.json"), *folder.glob("checkpoints/*/config.json")]
        newest = max((path.parent for path in found), key=_step, default=None)
        hint = f"did you mean {folder.name}/{newest.relative_to(folder)}?" if newest else ""
        raise UserError("is no Hugging Face model: it has no config.json", file=folder, key=key, hint=hint)
    if not isinstance(files.read_json(folder / "config.json"), dict):
        raise Fault("is no JSON object", file=folder / "config.json")
    if not (own := weights(folder)):
        raise UserError("holds no weights: no *.safetensors, no pytorch_model.bin", file=folder, key=key)
    if absent := [path.name for path in own if not path.is_file()]:
        problem = f"lacks {len(absent)} of the {len(own)} files of weights that its index names: "
        raise UserError(problem + ", ".join(absent[:3]), file=folder, key=key)


def _step(folder: Path) -> tuple[int, str]:
    """Orders checkpoints by the number that their names end with."""
    number = re.search(r"\d+$", folder.name)
    return int(number.group()) if number else -1, folder.name


def weights(folder: Path) -> list[Path]:
    """A model's files of weights, those that its index names first of all; `*.bin` only where there is nothing else."""
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin"):
        for index in sorted(folder.glob(f"{pattern}.index.json")):
            return [folder / name for name in sorted({*files.read_json(index)["weight_map"].values()})]
        if found := sorted(folder.glob(pattern)):
            return found
    return []


def require_undamaged(folder: Path, names: tuple[str, ...] | None = None) -> set[str]:
    """Compare a folder's weights (or the files named) with the manifest of the artifact that it lies in, if any.

    Returns:
        The names of those that the manifest lists.

    Raises:
        Fault: a file's size or SHA-256 is not what was published.
    """
    owner = manifest.around(folder)
    compared: set[str] = set()
    if owner is None:
        return compared
    published = {item.path: item for item in manifest.read(owner).files}
    for path in sorted(folder.resolve().iterdir()):
        item = published.get(path.relative_to(owner).as_posix())
        if item is None or (path.suffix != ".safetensors" if names is None else path.name not in names):
            continue
        if path.stat().st_size != item.bytes or hashes.of_file(path) != item.sha256:
            raise Fault("is damaged: its content differs from what was published", file=path)
        compared.add(path.name)
    return compared


def cost(folder: Path, key: str, given: Mapping[str, Cost]) -> Cost:
    """The cost of the model that a stage reads as `key`: that of its stage, or by its files.

    Raises:
        UserError: it is neither made by a stage nor a model folder.
    """
    if key in given:
        return given[key]
    require(folder, key)
    config = files.read_json(folder / "config.json")
    shape = config.get("text_config", config)
    sizes = [_parameters(path) for path in weights(folder) if path.suffix == ".safetensors"]
    return Cost(parameters=sum(sizes) or None, vocab_size=shape.get("vocab_size"))


def vocabulary(folder: Path) -> dict[str, int]:
    """The id of each token in a folder's `tokenizer.json`, added tokens among them.

    Raises:
        Fault: the file is damaged.
    """
    content = files.read_json(folder / "tokenizer.json")
    try:
        own = content["model"]["vocab"]  # of a unigram model, a list of tokens with their scores
        ids = dict(own) if isinstance(own, dict) else {token: number for number, (token, _) in enumerate(own)}
        return ids | {token["content"]: token["id"] for token in content["added_tokens"]}
    except (KeyError, TypeError, ValueError) as error:
        raise Fault(f"is no tokenizer: {error!r}", file=folder / "tokenizer.json") from error


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
