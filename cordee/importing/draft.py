"""A recipe in the making, and what became of each key of the file that it is made from."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

OFF: tuple[Any, ...] = (None, False, 0, "", "no", "none", "false", [], {})
"""Values that switch off what a key is for."""
UNKNOWN = "not known: what it does can't be told"


@dataclass(frozen=True)
class Lost:
    """A key without a counterpart."""

    why: str
    is_felt: bool
    """Whether results may differ without it."""


@dataclass(frozen=True)
class Tables:
    """What becomes of keys that are not taken: pattern of the key → why."""

    felt: Mapping[str, str]
    """No counterpart here, and results may differ."""
    felt_off: Mapping[str, str]
    """On without being told, here too; results may differ where it is switched off."""
    absent: Mapping[str, str]
    """No counterpart here; results are the same."""
    idle: Mapping[str, str]
    """Without meaning for a recipe."""


@dataclass
class Draft:
    """The stage that trains, and three lists: each key of the peer's file ends in one of them.

    Keys of the file are paths with points, as `datasets.0.type`; so are those of the stage (`trainer.learning_rate`).
    """

    file: Path
    peer: str
    given: dict[str, Any]
    stage: Literal["sft", "dpo"] = "sft"
    by: str = ""
    """What tells the method, where no key names it."""
    seed: int = 42
    keys: dict[str, Any] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    """What stands behind a key of the stage."""
    data: list[dict[str, Any]] = field(default_factory=list)
    template: str | None = None
    """The text of a chat template, which becomes a file beside the recipe."""
    holds_texts: bool = False
    """Whether the data are texts and no chats."""
    taken: dict[str, list[str]] = field(default_factory=dict)
    """Key of the file → keys of the stage."""
    lost: dict[str, Lost] = field(default_factory=dict)
    idle: dict[str, str] = field(default_factory=dict)
    """Key of the file → why it has no meaning for a recipe."""
    beside: list[str] = field(default_factory=list)
    """What the peer does without being told, and Cordée does otherwise."""

    def get(self, path: str, default: Any = None) -> Any:
        """The value of a key of the file; the default, too, where it is null."""
        found: Any = self.given
        for part in path.split("."):
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, dict):
                found = found.get(part)
            else:
                return default
        return default if found is None else found

    def is_on(self, path: str) -> bool:
        """Whether a key of the file switches something on."""
        return not is_off(self.get(path))

    def under(self, path: str) -> list[str]:
        """The keys of the items of a list of mappings: `datasets.0`, …; or the key itself, of one mapping."""
        found = self.get(path)
        if isinstance(found, list):
            return [f"{path}.{at}" for at, item in enumerate(found) if isinstance(item, dict)]
        return [path] if isinstance(found, dict) else []

    def take(self, ours: str, value: Any, *paths: str, remark: str = "") -> None:
        """Set a key of the stage from keys of the file; those that the file does not have are left out of the list."""
        self.keys[ours] = value
        self.came(ours, *paths)
        there = [path for path in paths if self.get(path) is not None]
        same = len(there) == 1 and there[0] == ours.rpartition(".")[2]
        self.remarks[ours] = remark or ("" if same else ", ".join(there) or f"{self.peer}'s default")

    def came(self, ours: str, *paths: str) -> None:
        """Note that keys of the file went into a key of the stage."""
        for path in paths:
            if self.get(path) is not None:
                into = self.taken.setdefault(path, [])
                into += [ours] if ours not in into else []

    def lose(self, path: str, why: str, *, is_felt: bool = True) -> None:
        """Note that a key of the file has no counterpart, unless it is in a list already."""
        if self.get(path) is not None and not self._is_settled(path):
            self.lost[path] = Lost(why, is_felt)

    def skip(self, path: str, why: str) -> None:
        """Note that a key of the file has no meaning for a recipe, unless it is in a list already."""
        if self.get(path) is not None and not self._is_settled(path):
            self.idle[path] = why

    def settle(self, tables: Tables) -> None:
        """Put all keys of the file that are in no list yet into one."""
        for key, value in self.given.items():
            self._settle(str(key), value, tables)

    def felt(self) -> dict[str, str]:
        """The keys without a counterpart whose absence may change results, each with the reason."""
        return {path: lost.why for path, lost in self.lost.items() if lost.is_felt}

    def _is_settled(self, path: str) -> bool:
        return path in self.taken or path in self.lost or path in self.idle

    def _settle(self, path: str, value: Any, tables: Tables) -> None:
        known = {*self.taken, *self.lost, *self.idle}
        if self._is_settled(path):
            return
        if any(other.startswith(f"{path}.") for other in known):
            for name, inner in _inner(value):
                self._settle(f"{path}.{name}", inner, tables)
            return
        if why := _match(tables.idle, path):
            self.idle[path] = why
        elif value is not None and (why := _match(tables.felt_off, path)):
            if is_off(value):
                self.lost[path] = Lost(why, is_felt=True)
            else:
                self.idle[path] = "switched on, as it is here"
        elif (why := _match(tables.felt, path) or _match(tables.absent, path)) and not is_off(value):
            self.lost[path] = Lost(why, _match(tables.felt, path) != "")
        elif why or value is None:
            self.idle[path] = "not set" if value is None else "switched off"
        else:
            self.lost[path] = Lost(UNKNOWN, is_felt=True)


def is_off(value: Any) -> bool:
    """Whether a value switches off what its key is for."""
    told = value.lower() if isinstance(value, str) else value
    return any(told is off if off is None or isinstance(off, bool) else told == off for off in OFF)


def leaves(values: Any, path: str = "") -> Iterator[str]:
    """The keys of a file down to those whose values are no mappings and no lists of them."""
    inner = list(_inner(values))
    if path and not inner:
        yield path
    for name, value in inner:
        yield from leaves(value, f"{path}.{name}".lstrip("."))


def _inner(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(str(name), inner) for name, inner in value.items()]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [(str(at), item) for at, item in enumerate(value)]
    return []


def _match(table: Mapping[str, str], path: str) -> str:
    return next((why for pattern, why in table.items() if fnmatchcase(path, pattern)), "")
