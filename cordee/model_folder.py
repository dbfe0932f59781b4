"""Hugging Face model folders without torch: whether a folder is one, whether it is damaged, and its size.

A folder may also be a LoRA adapter (Hu et al. 2021, arXiv 2106.09685), as PEFT writes it: then it names its base.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee import files, hashes, manifest
from cordee.config import Input
from cordee.cost import Cost
from cordee.errors import Fault, UserError
from cordee.memory import Decoder

ADAPTER_CONFIG = "adapter_config.json"
LONGEST_HEADER = 100_000_000
"""Bytes: the limit of the safetensors format."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED = ("pytorch_model*.bin", "adapter_model*.bin", "*.pt", "*.pth", "*.ckpt")
"""Weights in torch's own format, a pickle, which runs what its maker wrote: they are never opened."""
ADAPTERS_BASE = "base_model.json"
"""Beside an adapter that `posttrain` wrote: the SHA-256 of each weight file of its base."""
_NESTED = ("text_config", "language_config", "llm_config")
"""Where the config of a model of several modalities holds that of its language model."""


@dataclass(frozen=True)
class Shape:
    """What a config says of a language model's size; None where it says nothing."""

    layers: int | None
    width: int | None
    positions: int | None
    """The longest sequence, in tokens."""
    vocab_size: int | None
    """Rows of the embedding."""


class ModelInput(Input):
    """A model's folder, or an adapter's, which names its base."""

    def further_files(self) -> list[Path]:
        """The files of an adapter's base, where they are found."""
        base = recorded_base(self) if is_adapter(self) else None
        return list(files.walk(base)) if base else []


def require(folder: Path, key: str | None = None) -> None:
    """Check that a folder is a model with weights.

    Raises:
        UserError: it is something else; says what.
        Fault: its config is damaged.
    """
    if not folder.is_dir():
        raise UserError("is no folder", file=folder, key=key)
    if is_adapter(folder):
        raise UserError("is an adapter, not a model", file=folder, key=key, hint="merge it into its base first")
    if (folder / ADAPTER_CONFIG).is_file():  # transformers would put the adapter on them, merged already or not
        problem = f"holds whole weights and {ADAPTER_CONFIG}: whether the adapter is in the weights can't be known"
        hint = f"move {ADAPTER_CONFIG} away if they are merged; name the adapter's folder without the weights otherwise"
        raise UserError(problem, file=folder, key=key, hint=hint)
    if not (folder / "config.json").is_file():
        names = (place + name for place in ("*/", "checkpoints/*/") for name in ("config.json", ADAPTER_CONFIG))
        found = [path for name in names for path in folder.glob(name)]
        newest = max((path.parent for path in found), key=_step, default=None)
        hint = f"did you mean {folder.name}/{newest.relative_to(folder)}?" if newest else ""
        raise UserError("is no Hugging Face model: it has no config.json", file=folder, key=key, hint=hint)
    config = files.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise Fault("is no JSON object", file=folder / "config.json")
    _require_no_code(config, folder / "config.json", key)
    if not (own := weights(folder)):
        raise _no_weights(folder, key)
    if absent := [path.name for path in own if not path.is_file()]:
        problem = f"lacks {len(absent)} of the {len(own)} files of weights that its index names: "
        raise UserError(problem + ", ".join(absent[:3]), file=folder, key=key)


def _require_no_code(config: Any, file: Path, key: str | None) -> None:
    """Check that a config asks for no code but transformers' own, which some versions run whatever they are told.

    A kernel of the hub is native code; a recipe may ask for one by its name, a model's folder may not.

    Raises:
        UserError: it asks for some.
    """
    named = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for name, value in named:
        is_kernel = "_implementation" in str(name) and "/" in str(value)
        if is_kernel or (name in ("trust_remote_code", "megatron_config") and value):  # the latter names a module
            problem = f"{name}: {value} asks for code that is none of transformers'"
            raise UserError(problem, file=file, key=key, hint="delete the line, if the model is to be trusted at all")
        _require_no_code(value, file, key)


def _no_weights(folder: Path, key: str | None) -> UserError:
    """That a folder has no safetensors, and what to do where it has weights that are pickled."""
    pickled = next((path for pattern in PICKLED for path in sorted(folder.glob(pattern))), None)
    if pickled is None:
        return UserError("holds no weights: it has no *.safetensors", file=folder, key=key)
    problem = f"holds no safetensors, and {pickled.name} is a pickle, which can run code: it is not opened"
    hint = "where you trust its maker, open it with transformers or PEFT, and `save_pretrained` a new folder"
    return UserError(problem, file=folder, key=key, hint=hint)


def _step(folder: Path) -> tuple[int, str]:
    """Orders checkpoints by the number that their names end with."""
    number = re.search(r"\d+$", folder.name)
    return int(number.group()) if number else -1, folder.name


def weights(folder: Path) -> list[Path]:
    """A model's files of weights, in transformers' order: a single file, what an index names, others.

    Raises:
        UserError: an index names no file of the folder.
    """
    for pattern in ("model*.safetensors", "*.safetensors"):
        if (single := folder / pattern.replace("*", "")).is_file():
            return [single]
        for index in sorted(folder.glob(f"{pattern}.index.json")):
            return [folder / name for name in _shards(index)]
        if found := sorted(folder.glob(pattern)):
            return found
    return []


def _shards(index: Path) -> list[str]:
    """The files that an index of weights names."""
    try:
        names = sorted({files.inside(name) for name in files.read_json(index)["weight_map"].values()})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = str(error) if isinstance(error, ValueError) else "is no index of weights"
        raise UserError(problem, file=index, key="weight_map") from error
    if odd := [name for name in names if not name.endswith(".safetensors")]:
        raise UserError(f"{odd[0]!r} is no safetensors", file=index, key="weight_map")
    return names


def require_undamaged(folder: Path, names: Iterable[str] | None = None) -> set[str]:
    """Compare a folder's weights (or files that are named) with the manifest of the artifact that it lies in, if any.

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
    inside = folder.resolve()
    for name in [path.name for path in sorted(inside.glob("*.safetensors"))] if names is None else names:
        path = inside / name
        item = published.get(path.relative_to(owner).as_posix())
        if item is None or not path.is_file():
            continue
        if path.stat().st_size != item.bytes or hashes.of_file(path) != item.sha256:
            raise Fault("is damaged: its content differs from what was published", file=path)
        compared.add(name)
    return compared


def is_adapter(folder: Path) -> bool:
    """Whether a folder is a PEFT adapter's, and holds no model of its own."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    return not any(found for name in ("model*.safetensors", "pytorch_model*.bin") for found in folder.glob(name))


def base_of(adapter: Path, given: Path | None = None, *, key: str | None = None, base_key: str | None = None) -> Path:
    """The folder of the model that an adapter was trained on.

    Args:
        adapter: the adapter's folder, whose config names the base: relative to it, or to where this process stands.
        given: the base, where the recipe has it.
        key: the adapter's key, for errors.
        base_key: the base's key, where there is one.

    Raises:
        UserError: it is no model folder, or is not found.
    """
    if given is not None:
        require(given, base_key)
        return given
    if base := recorded_base(adapter):
        require(base, key)
        return base
    recorded = files.read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    problem = f"its base {recorded!r} is no model folder here" if recorded else "its config names no base"
    where = f"`{base_key}:`" if base_key else f"base_model_name_or_path in {ADAPTER_CONFIG}"
    hint = f"give the folder of the model that it was trained on as {where}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", recorded or ""):
        hint += f"; of the hub, it is found where hub:{recorded} is fetched too, as another model of the recipe"
    raise UserError(problem, file=adapter, key=key, hint=hint)


def recorded_base(adapter: Path) -> Path | None:
    """The base that an adapter's config names, where it is a model folder here."""
    recorded = files.read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not recorded:
        return None
    places = [(adapter / recorded).resolve(), Path(recorded).resolve(), *_beside_on_hub(adapter.resolve(), recorded)]
    return next((place for place in places if (place / "config.json").is_file()), None)


def _beside_on_hub(adapter: Path, name: str) -> Iterator[Path]:
    """Where the base of an adapter of the hub lies: in the same folder, or in the same cache."""
    if len(adapter.parents) > 2:
        yield adapter.parents[1] / name
        cached = adapter.parents[2] / f"models--{name.replace('/', '--')}"
        if (ref := cached / "refs" / "main").is_file():
            yield cached / "snapshots" / ref.read_text(encoding="utf-8").strip()


def served_base(folder: Path, key: str | None = None) -> Path:
    """The folder of an adapter's base, by its config alone; any other folder is its own.

    Raises:
        UserError: the base is not there.
    """
    return base_of(folder, key=key) if is_adapter(folder) else folder


def chat_template(folder: Path) -> str | None:
    """The chat template in a tokenizer's folder, of several the default one; None where there is none."""
    if (own := folder / "chat_template.jinja").is_file():
        return own.read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    told = files.read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(told, list):  # as transformers wrote several
        told = {one["name"]: one["template"] for one in told}.get("default")
    return told or None


def tokenizer_of(folder: Path) -> Path:
    """The folder with the tokenizer of a model or an adapter: its own or, where an adapter has none, its base's."""
    return folder if (folder / "tokenizer.json").is_file() else served_base(folder)


def require_served(folder: Path, key: str | None = None) -> None:
    """Check that a folder is a model with weights, or an adapter whose base is the model that it was trained on.

    Raises:
        UserError: it is something else; says what.
        Fault: its config is damaged.
    """
    base = served_base(folder, key)
    require(base, key)
    if base == folder:
        return
    require_adapter(folder, base, key)


def require_adapter(folder: Path, base: Path, key: str | None = None) -> None:
    """Check that a folder is an adapter with weights, and that `base` is the one that its own record names, if any.

    Raises:
        UserError: it is something else, or the adapter of another base.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        is_model = (folder / "config.json").is_file()
        what = "is a model, not an adapter" if is_model else f"is no adapter: it has no {ADAPTER_CONFIG}"
        raise UserError(what, file=folder, key=key)
    _require_no_code(files.read_json(folder / ADAPTER_CONFIG), folder / ADAPTER_CONFIG, key)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise _no_weights(folder, key)
    known = folder / ADAPTERS_BASE
    named = recorded_base(folder)
    recorded = files.read_json(known)["files"] if known.is_file() else weight_hashes(named) if named else None
    if recorded not in (None, weight_hashes(base)):
        hint = f"its base was {files.read_json(folder / ADAPTER_CONFIG).get('base_model_name_or_path')}"
        raise UserError(f"was trained on other weights than those of {base}", file=folder, key=key, hint=hint)


def weight_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each weight file of a model."""
    return {path.name: hashes.of_file(path) for path in weights(folder)}


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model within that of a model of several modalities; any other config is its own."""
    return next((config[name] for name in _NESTED if isinstance(config.get(name), Mapping)), config)


def token_id(config: Mapping[str, Any], name: str) -> Any:
    """What a config, or that of its language model, names as `eos_token_id` or `pad_token_id`; None: nothing."""
    own = config.get(name)
    return language_config(config).get(name) if own is None else own


def shape(config: Mapping[str, Any]) -> Shape:
    """The shape in a model's `config.json`, or in what transformers makes of it as a mapping."""
    text = language_config(config)

    def first(*names: str) -> int | None:
        return next((text[name] for name in names if isinstance(text.get(name), int)), None)

    return Shape(
        layers=first("num_hidden_layers", "n_layer", "n_layers"),
        width=first("hidden_size", "n_embd", "d_model"),
        positions=first("max_position_embeddings", "n_positions"),
        vocab_size=first("vocab_size"),
    )


def positions(folder: Path) -> int | None:
    """The longest sequence of a model, or of an adapter's base, in tokens; None where no config tells it here."""
    base = recorded_base(folder) if is_adapter(folder) else folder
    file = base / "config.json" if base else None
    return shape(files.read_json(file)).positions if file and file.is_file() else None


def cost(
    folder: Path, key: str, given: Mapping[str, Cost], *, base: Path | None = None, base_key: str | None = None
) -> Cost:
    """The cost of the model that a stage reads as `key`: that of its stage, or by its files; of an adapter, its base's.

    `base` is the adapter's base where the stage has a key for it, `base_key`.

    Raises:
        UserError: it is neither made by a stage nor a model folder.
    """
    if key in given:
        return given[key]
    if is_adapter(folder):
        folder = base_of(folder, base, key=key, base_key=base_key)
    require(folder, key)
    config = files.read_json(folder / "config.json")
    shapes = [_shapes(path) for path in weights(folder)]
    parameters = sum(math.prod(sizes) for file in shapes for sizes in file.values())
    named = {name: sizes for file in shapes for name, sizes in file.items()}
    return Cost(
        parameters=parameters or None,
        vocab_size=shape(config).vocab_size,
        decoder=Decoder.of(language_config(config), named, parameters),
    )


def stored_bytes(folder: Path, key: str, given: Mapping[str, Cost]) -> float | None:
    """Bytes of the weights of the model that a stage reads as `key`, as they are stored; of an adapter, its base's.

    Of a model that a stage will make they are those in float32; None where they are not known.

    Raises:
        UserError: it is neither made by a stage nor a model folder.
    """
    base = recorded_base(folder) if is_adapter(folder) else folder
    if base and (found := [path.stat().st_size for path in weights(base) if path.is_file()]):
        return float(sum(found))
    parameters = cost(folder, key, given).parameters
    return None if parameters is None else 4.0 * parameters


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


def _shapes(file: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a safetensors file, of its few buffers too.

    They stand in the header: eight bytes of length, then JSON.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(min(length, LONGEST_HEADER)))
        return {name: [*map(int, tensor["shape"])] for name, tensor in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Fault("is damaged: its header can't be read", file=file) from error
