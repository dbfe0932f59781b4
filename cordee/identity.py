"""What a stage's result depends on, and nothing else: its module and its version, seed, config and inputs.

The *identity* is a JSON value; its SHA-256 is the *fingerprint*. Fields marked `Execution` are left out. An `Input` is
replaced by what it points to: `artifact <fingerprint>/<place>`, or `content <sha256>` with the kind of a data file.

The fields of a config, and of what is passed to a library, have no order and are sorted. In any other mapping the order
counts (`models:` are evaluated in theirs), and is kept.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cordee.config import Config, Input, is_execution, libraries
from cordee.data.kinds import kind
from cordee.errors import UserError


def of_stage(
    uses: str,
    seed: int,
    config: Config,
    inputs: Mapping[str, str],
    place: tuple[object, str] = (None, "config"),
    version: int = 1,
) -> dict[str, Any]:
    """The identity of a stage.

    Args:
        uses: its module.
        seed: the recipe's.
        config: its keys.
        inputs: for each input's key what it points to.
        place: the file and key that an error names.
        version: the module's `VERSION`.

    Raises:
        UserError: a number is not finite.
    """
    found = _identity(config, "", inputs)
    for key, leaf in _flat(found):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise UserError(f"must be a finite number, not {leaf}", file=place[0], key=f"{place[1]}.{key}")
    return {"config": found, "seed": seed, "uses": uses, "version": version}


def of_path(path: Path, sha256: str) -> str:
    """What a file or folder with this content counts as; of a data file its kind counts too, as it says how to read it.

    The same lines are one text in `chats.txt`, and rows in `chats.jsonl`.
    """
    suffix, codec = ("", None) if path.is_dir() else kind(path)
    return "/".join(filter(None, (f"content {sha256}", suffix and f"{suffix}{f' {codec}' if codec else ''}")))


def fingerprint(identity: dict[str, Any]) -> str:
    """The SHA-256 of an identity's JSON, with its keys in the order in which `of_stage` writes them."""
    text = json.dumps(identity, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(value: Any, key: str, inputs: Mapping[str, str]) -> Any:
    """A config's value as JSON.

    Raises:
        TypeError: a value that could not be written the same way twice.
    """
    if isinstance(value, Input):
        return inputs[key]
    if isinstance(value, Config):
        fields = sorted(name for name in type(value).model_fields if not is_execution(type(value), name))
        found = {name: _identity(getattr(value, name), f"{key}.{name}".lstrip("."), inputs) for name in fields}
        return found | {name: _sorted(found[name]) for name, _ in libraries(type(value)) if name in found}
    if isinstance(value, dict):
        return {str(name): _identity(item, f"{key}.{name}".lstrip("."), inputs) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(item, f"{key}.{index}".lstrip("."), inputs) for index, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{key}: {value!r} can't be part of an identity")


def _sorted(value: Any) -> Any:
    """A JSON value with the keys of all its mappings sorted."""
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def execution(config: Config) -> dict[str, Any]:
    """The fields that only say how to execute, as JSON."""
    return {
        name: config.model_dump(mode="json", include={name})[name]
        for name in type(config).model_fields
        if is_execution(type(config), name)
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Key by key what differs between two identities: `trainer.learning_rate 0.001 → 0.0005`."""
    before, after = dict(_flat(old)), dict(_flat(new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key, _NONE) != after.get(key, _NONE):
            yield f"{key.removeprefix('config.')} {_show(before.get(key, _NONE))} → {_show(after.get(key, _NONE))}"
    yield from _orders(old["config"], new["config"])


def _orders(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """The mappings whose keys changed places: `models order: base, sft → sft, base`."""
    if isinstance(old, dict) and isinstance(new, dict):
        before, after = [name for name in old if name in new], [name for name in new if name in old]
        if before != after:
            yield f"{key} order: {', '.join(before)} → {', '.join(after)}"
        pairs = [(name, old[name], new[name]) for name in before]
    elif isinstance(old, list) and isinstance(new, list):
        pairs = [(str(index), *both) for index, both in enumerate(zip(old, new, strict=False))]
    else:
        return
    for name, one, other in pairs:
        yield from _orders(one, other, f"{key}.{name}".lstrip("."))


_NONE = object()


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """A nested JSON value as dotted keys and leaves."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not items:
        yield key, value
        return
    for name, item in items:
        yield from _flat(item, f"{key}.{name}".lstrip("."))


def _show(value: Any) -> str:
    """A value for a person: hashes are cut to eight digits."""
    if value is _NONE:
        return "(none)"
    if isinstance(value, str) and value.startswith(("artifact ", "content ")):
        kind, _, rest = value.partition(" ")
        digest, slash, place = rest.partition("/")
        return f"{kind} {digest[:8]}{slash}{place}"
    return json.dumps(value, ensure_ascii=False)
