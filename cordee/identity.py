"""What a stage's result depends on, and nothing else: its module, seed, config and the content of its inputs.

The *identity* is a JSON value; its SHA-256 is the *fingerprint*. Fields marked `Execution` are left out. An
`Input` stands in it as what it points to: `artifact <fingerprint>/<place>` or `content <sha256>`.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from cordee.config import Config, Input, is_execution


def of_stage(uses: str, seed: int, config: Config, inputs: Mapping[str, str]) -> dict[str, Any]:
    """The identity of a stage; `inputs` says for each input's key what it points to."""
    return {"uses": uses, "seed": seed, "config": _identity(config, "", inputs)}


def fingerprint(identity: dict[str, Any]) -> str:
    """The SHA-256 of an identity's canonical JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(value: Any, key: str, inputs: Mapping[str, str]) -> Any:
    """A config's value as JSON.

    Raises:
        TypeError: a value that could not be written the same way twice.
    """
    if isinstance(value, Input):
        return inputs[key]
    if isinstance(value, Config):
        return {
            name: _identity(getattr(value, name), f"{key}.{name}".lstrip("."), inputs)
            for name in type(value).model_fields
            if not is_execution(type(value), name)
        }
    if isinstance(value, dict):
        return {str(name): _identity(item, f"{key}.{name}".lstrip("."), inputs) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(item, f"{key}.{index}".lstrip("."), inputs) for index, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError(f"{key}: {value!r} can't be part of an identity")


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
