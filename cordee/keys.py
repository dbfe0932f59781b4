"""The keys of a stage, read from its `Config` for `cordee list`."""

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from cordee.config import Config, FunctionOf, Input, config_in, is_execution, libraries


@dataclass(frozen=True)
class Key:
    """One key of a stage."""

    name: str
    """As in an override: `learning_rate`, `launch.num_processes`, `data.0.path`."""
    kind: str
    """Type, limits and default: `int, >= 1, default 8, execution only`."""
    meaning: str


def of(config: type[Config], prefix: str = "") -> Iterator[Key]:
    """Every key of a config, required ones first; keys of a nested mapping follow the key of the mapping."""
    handed = dict(libraries(config))
    for name, field in sorted(config.model_fields.items(), key=lambda item: not item[1].is_required()):
        kind = f"fields of {handed[name].dataclass_name}" if name in handed else _kind(field.annotation)
        for mark in field.metadata:
            if isinstance(mark, FunctionOf):
                kind = " | ".join(mark.names())
        words = [kind, *_limits(field), _default(field)]
        if is_execution(config, name):
            words.append("execution only")
        yield Key(f"{prefix}{name}", ", ".join(words), " ".join((field.description or "").split()))
        if inner := config_in(field.annotation):
            place = "0." if get_origin(field.annotation) is list else ""
            yield from of(inner, f"{prefix}{name}.{place}")


def _kind(annotation: Any) -> str:
    """A type in words: `int`, `error | split`, `list of mapping`, `mapping of str to int`, `[int, int]`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    words = [_kind(item) for item in inner]
    if words:
        phrases = {list: "list of {}", dict: "mapping of {} to {}", tuple: f"[{', '.join(words)}]"}
        return phrases.get(origin, " | ".join(words)).format(*words)
    named: dict[type, str] = {Config: "mapping", Input: "reference or path", types.NoneType: "null"}
    return next((name for kind, name in named.items() if issubclass(annotation, kind)), str(annotation.__name__))


def _limits(field: FieldInfo) -> Iterator[str]:
    """The limits of a field's value: `>= 1`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}
    for mark in field.metadata:
        yield from (f"{sign} {getattr(mark, name)}" for name, sign in signs.items() if hasattr(mark, name))


def _default(field: FieldInfo) -> str:
    """The default of a key."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        return "default as below"
    return f"default {value if isinstance(value, str) and value else json.dumps(value)}"
