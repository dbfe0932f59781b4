"""Recipes: YAML files with a name, a seed, and stages, read into typed and checked stages."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from cordee import peek, stage, yaml12
from cordee.config import Config, Library, config_in, inputs, libraries
from cordee.errors import UserError, nearest
from cordee.resources import Resources
from cordee.shown import credential

C = TypeVar("C", bound=Config)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
CERTIFICATES = "$certificates"
OWN_KEYS = ("uses", "resources")
"""The keys of a stage in a recipe that are not its module's."""
WRITE_BOOL = "write true or false"
SEEDS = 2**32
"""Seeds are less than this, as NumPy requires."""


@dataclass(frozen=True)
class RecipeStage:
    """One stage of a recipe: its name, its module, and its config with unresolved references."""

    name: str
    stage: stage.Stage
    config: Config
    needs: tuple[str, ...]
    """The stages of this recipe that it refers to."""
    resources: Resources


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked; each stage comes after those that it needs."""

    file: Path
    name: str
    seed: int
    stages: tuple[RecipeStage, ...]
    document: dict[str, Any]
    """The YAML with the overrides, as it is stored with the run."""
    unchecked: tuple[str, ...] = ()
    """Libraries whose keys could not be checked, because they are not installed here."""


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `stage.key=value` overrides, and check every key of every stage.

    Raises:
        UserError: anything about it is wrong; nothing was started.
    """
    document = yaml12.read(path)
    for override in overrides:
        apply_override(document, override)
    return check(document, path)


def apply_override(document: dict[str, Any], override: str) -> None:
    """Apply `stage.key=value` (or `seed=…`, `name=…`) to a recipe's document."""
    key, equals, _ = override.partition("=")
    first, stages = key.partition(".")[0], document.get("stages")
    if first in ("name", "seed"):
        set_value(document, override)
        return
    if override in (stages if isinstance(stages, dict) else ()):
        hint = "one stage alone is run by `cordee stage RECIPE STAGE`"
        raise UserError(f"{override!r} is no key=value", file="command line", hint=hint)
    if equals and key and isinstance(stages, dict) and first not in stages:
        raise UserError(f"no stage {first!r}", file="command line", key=key, hint=nearest(first, map(str, stages)))
    set_value(stages, override)


def set_value(place: Any, override: str) -> None:
    """Set `key=value` of the command line in a mapping, or below it (`a.b=value`); the value is read as YAML.

    Raises:
        UserError: it is no such thing, or there is nothing to set.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is no key=value", file="command line")
    parts = key.split(".")
    for part in parts[:-1]:
        if isinstance(place, dict):
            place = place.setdefault(part, {})
        elif isinstance(place, list) and part.isdecimal() and int(part) < len(place):
            place = place[int(part)]
        else:
            raise UserError(f"nothing to set below {part!r}", file="command line", key=key)
    value = parse_value(key, text)
    if isinstance(place, list) and parts[-1].isdecimal() and int(parts[-1]) < len(place):
        place[int(parts[-1])] = value
    elif isinstance(place, dict):
        place[parts[-1]] = value
    else:
        raise UserError(f"nothing to set below {'.'.join(parts[:-1])!r}", file="command line", key=key)


def parse_value(key: str, text: str) -> Any:
    """The YAML value that a key has on the command line.

    Raises:
        UserError: it is none.
    """
    try:
        return yaml12.parse(text)
    except yaml.YAMLError as error:
        hint = f"a text with such signs is quoted: '{key}=\"{text}\"'" if not {*"\"'"} & {*text} else ""
        raise UserError(f"{text!r} is no YAML value", file="command line", key=key, hint=hint) from error


def check(document: dict[str, Any], file: Path) -> Recipe:
    """Turn a recipe's document into a `Recipe`."""
    require_no_credential(document, file, "")
    unknown = [key for key in document if key not in ("name", "seed", "stages")]
    if unknown:
        raise UserError(
            "unknown key", file=file, key=str(unknown[0]), hint=nearest(str(unknown[0]), ["name", "seed", "stages"])
        )
    name, seed, stages = document.get("name"), document.get("seed", 0), document.get("stages")
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise UserError(f"must be a word of letters, digits, '-' and '_', not {name!r}", file=file, key="name")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UserError(f"must be a whole number, not {seed!r}", file=file, key="seed")
    if not 0 <= seed < SEEDS:
        raise UserError(f"must be at least 0 and less than {SEEDS}, not {seed}", file=file, key="seed")
    if not (isinstance(stages, dict) and stages):
        raise UserError("must be a mapping of at least one stage", file=file, key="stages")
    checked = {str(key): _check_stage(str(key), value, stages, file) for key, value in stages.items()}
    missing = sorted(
        {
            mark.dataclass_name.partition(".")[0]
            for item in checked.values()
            for _, mark in libraries(type(item.config))
            if not peek.is_installed(mark.dataclass_name.partition(".")[0])
        }
    )
    return Recipe(file, name, seed, tuple(_in_order(checked, file)), document, tuple(missing))


def _check_stage(name: str, value: Any, stages: Mapping[str, Any], file: Path) -> RecipeStage:
    """Check one stage: its name, its module, its keys and its references."""
    key = f"stages.{name}"
    if not NAME.fullmatch(name):
        raise UserError("a stage's name is a word of letters, digits, '-' and '_'", file=file, key=key)
    if not isinstance(value, dict) or not isinstance(value.get("uses"), str):
        raise UserError("a stage needs `uses: package.module`", file=file, key=key)
    module = stage.load(value["uses"], file=file, key=f"{key}.uses")
    config = validate(module.config, {k: v for k, v in value.items() if k not in OWN_KEYS}, file, key)
    resources = value.get("resources", {})
    if not isinstance(resources, dict):
        raise UserError(
            "must be a mapping", file=file, key=f"{key}.resources", hint=nearest("", Resources.model_fields)
        )
    needed = validate(Resources, resources, file, f"{key}.resources")
    return RecipeStage(name, module, config, tuple(_needs(config, stages, file, key)), needed)


def validate(model: type[C], values: dict[str, Any], file: object, key: str) -> C:
    """Check a stage's keys against its `Config`, and those for a library against the library's dataclass.

    Args:
        model: the config.
        values: the keys.
        file: where they stand, for errors.
        key: the stage's, `stages.sft`; empty where they stand alone.

    Raises:
        UserError: one is wrong.
    """
    try:
        config = model.model_validate(values)
    except UserError as error:  # of a validator
        raise error.in_stage(file, key, model.model_fields) from error
    except ValidationError as error:
        first = error.errors()[0]
        loc = [part for part in first["loc"] if not str(part).startswith(("constrained-", "list[", "function-"))]
        place = ".".join([key, *map(str, loc)]).lstrip(".")
        if first["type"] == "extra_forbidden":
            *above, name = first["loc"]
            known = [*_fields_at(model, above), *(OWN_KEYS if not above and key.count(".") == 1 else ())]
            hint = _elsewhere(model, above, str(name)) or nearest(str(name), known)
            raise UserError("unknown key", file=file, key=place, hint=hint) from error
        if first["type"] == "value_error":  # what a validator of ours says is whole, and its input all the keys
            raise UserError(str(first["ctx"]["error"]), file=file, key=place) from error
        problem = "missing" if first["type"] == "missing" else f"{first['msg']}, not {first['input']!r}"
        hint = WRITE_BOOL if first["type"] in ("bool_type", "bool_parsing") else ""
        raise UserError(problem, file=file, key=place, hint=hint) from error
    for field, mark in libraries(model):
        package = mark.dataclass_name.partition(".")[0]
        if peek.is_installed(package) and (given := getattr(config, field)) is not None:
            names = peek.dataclass_fields(mark.dataclass_name)
            for name, value in given.items():
                if name not in names and name in model.model_fields:
                    hint = f"write {name} beside {field}"
                    raise UserError("unknown key", file=file, key=f"{key}.{field}.{name}", hint=hint)
                _check_library_key(name, value, names, mark.owned, (file, f"{key}.{field}.{name}"))
    return config


def _elsewhere(model: type[Config], above: Sequence[int | str], name: str) -> str:
    """What to write instead of a key that stands on another level than its own; "" where it is none of the stage's."""
    if above:
        return f"write {name} beside {above[0]}" if len(above) == 1 and name in model.model_fields else ""
    fields = [field for field, mark in libraries(model) if name in _known(mark)]
    for field, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, Config) and name in inner.model_fields:
            fields.append(field)
    return f"write {fields[0]}: {{{name}: …}}" if fields else ""


def _known(mark: Library) -> Collection[str]:
    """The fields of a library's dataclass that a mapping may hold."""
    if not peek.is_installed(mark.dataclass_name.partition(".")[0]):
        return ()
    return peek.dataclass_fields(mark.dataclass_name).keys() - mark.owned.keys()


def _check_library_key(
    name: str, value: Any, known: Mapping[str, Any], owned: Mapping[str, str], place: tuple[object, str]
) -> None:
    """Check one key that is passed to a library's own dataclass."""
    file, key = place
    if name in owned:
        instead = owned[name] and f", or write {owned[name]}"
        raise UserError("the stage sets this itself", file=file, key=key, hint=f"leave it out{instead}")
    if name not in known:
        raise UserError("unknown key", file=file, key=key, hint=nearest(name, set(known) - set(owned)))
    try:  # strictly, since the library is given the value as it stands; as JSON, in which a list may be a tuple
        TypeAdapter(known[name]).validate_json(json.dumps(value, allow_nan=False), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        hint = WRITE_BOOL if first["type"] == "bool_type" else ""
        raise UserError(f"{first['msg']}, not {value!r}", file=file, key=key, hint=hint) from error
    except (TypeError, ValueError) as error:  # .inf and .nan, and what YAML's tags can make: dates, bytes, sets
        problem = f"must be a finite number, a word, a list or a mapping, not {value!r}"
        raise UserError(problem, file=file, key=key) from error


def _fields_at(model: type[Config], loc: Sequence[int | str]) -> list[str]:
    """The fields of a config nested within another one."""
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            found = config_in(model.model_fields[part].annotation)
            model = found or model
    return list(model.model_fields)


def _needs(config: Config, stages: Mapping[str, Any], file: Path, key: str) -> Iterator[str]:
    """The stages that a config refers to; a reference to none is an error."""
    for place, value in inputs(config):
        text = str(value)
        if not text.startswith("$") or text == CERTIFICATES:
            continue
        name = text[1:].partition("/")[0]
        if name not in stages:
            raise UserError(
                f"{text} refers to no stage", file=file, key=f"{key}.{place}", hint=nearest(name, map(str, stages))
            )
        yield name


def require_no_credential(value: Any, file: Path, key: str) -> None:
    """Refuse a token, a key or a password: what is read is stored with the run, in manifests and in reports.

    Raises:
        UserError: there is one; it is not repeated.
    """
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            require_no_credential(item, file, f"{key}.{name}".lstrip("."))
    elif isinstance(value, str) and credential(value):
        hint = "leave it to the environment (HF_TOKEN, WANDB_API_KEY), where libraries look for it"
        raise UserError("holds what looks like a token, a key or a password", file=file, key=key, hint=hint)


def _in_order(stages: dict[str, RecipeStage], file: Path) -> Iterator[RecipeStage]:
    """The stages in the file's order, except that each comes after those that it needs."""
    placed: set[str] = set()
    waiting = list(stages)
    while waiting:
        free = next((name for name in waiting if placed.issuperset(stages[name].needs)), None)
        if free is None:
            raise UserError(f"these refer to each other in a cycle: {_cycle(stages, waiting)}", file=file, key="stages")
        waiting.remove(free)
        placed.add(free)
        yield stages[free]


def _cycle(stages: dict[str, RecipeStage], waiting: list[str]) -> str:
    """A cycle of references, `a → b → a`; each waiting stage needs another waiting stage."""
    path = [waiting[0]]
    while path[-1] not in path[:-1]:
        path.append(next(name for name in stages[path[-1]].needs if name in waiting))
    return " → ".join(path[path.index(path[-1]) :])
