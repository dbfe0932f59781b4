"""Rows that can't be used: why, how many, and the first of each kind."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cordee.data.row import Broken
from cordee.errors import UserError

SHOWN, SHOWN_CHARACTERS = 3, 200
"""Rows that are named of each kind of problem, and how much of each is kept."""
KINDS = 20
"""Kinds of problems that are told apart: a template's own errors may differ from row to row."""
DIFFER = "; those of other rows differ"
MISSING = ("nan", "NaN", "None", "null", "N/A")
"""What pandas and others write as text where there is no value."""
Note = Callable[[str], None]
"""Told what is not as one might expect, and is no error."""


class BadRowError(Exception):
    """A row that can't be used: the kind of problem, what shows it in this row (`message 2`), and what to write.

    Where the kind is told by a row's own words (its columns), `kind` is what such problems have in common.
    """

    is_overlong = False

    def __init__(self, problem: str, shown_by: str = "", hint: str = "", kind: str = "") -> None:
        super().__init__(problem)
        self.problem, self.shown_by, self.hint, self.kind = problem, shown_by, hint, kind


class OverlongRowError(BadRowError):
    """A row that is longer than the settings or the model allow."""

    is_overlong = True


@dataclass(frozen=True)
class Shown:
    """A row that shows a problem."""

    file: Path
    number: int
    shown_by: str
    row: str
    """Its first characters."""


@dataclass
class Kind:
    """The rows with one problem."""

    problem: str
    """In the first row's words, where rows have their own."""
    hint: str
    is_overlong: bool
    common: str = ""
    """What the words of all rows have in common, where rows have their own."""
    count: int = 0
    shown: list[Shown] = field(default_factory=list)
    """The first `SHOWN`."""

    def add(self, count: int, shown: list[Shown]) -> None:
        """Count further rows."""
        self.count += count
        self.shown += shown[: SHOWN - len(self.shown)]


class Problems:
    """What is wrong with rows, gathered, so that one error names every kind with its first rows."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, str], Kind] = {}
        self._rows: set[tuple[Path, int]] = set()

    @contextmanager
    def of(self, file: Path, number: int, values: Any) -> Iterator[None]:
        """Note a `BadRowError` of a row, whose content is `values`, and go on; of several, a row's first."""
        try:
            yield
        except BadRowError as error:
            self._note(file, number, values, error)
        except RecursionError:
            self._note(file, number, values, BadRowError("is nested too deeply"))

    def _note(self, file: Path, number: int, values: Any, error: BadRowError) -> None:
        if self.has(file, number):
            return
        self._rows.add((file, number))
        try:
            text = values.row if isinstance(values, Broken) else json.dumps(values, ensure_ascii=False, default=str)
        except (ValueError, RecursionError):
            text = ""
        shown = Shown(file, number, error.shown_by, text[:SHOWN_CHARACTERS])
        self._kind(Kind(error.problem, error.hint, error.is_overlong, error.kind)).add(1, [shown])

    def has(self, file: Path, number: int) -> bool:
        """Whether a row has a problem; known of the rows that were noted here."""
        return (file, number) in self._rows

    def add(self, other: "Problems") -> None:
        """Add what was found in the rows that follow."""
        for kind in other.kinds.values():
            self._kind(Kind(kind.problem, kind.hint, kind.is_overlong, kind.common)).add(kind.count, kind.shown)

    def counted(self) -> "Problems":
        """What was found, without the rows it was found in: small enough to pass on."""
        found = Problems()
        found.add(self)
        return found

    def _kind(self, one: Kind) -> Kind:
        """The kind that a problem is of; `one` where it is the first of it."""
        name = (one.common, "") if one.common else (one.problem, one.hint)
        if len(self.kinds) >= KINDS and name not in self.kinds and not one.is_overlong:
            name, one = ("other problems", ""), Kind("other problems", "", is_overlong=False)
        found = self.kinds.setdefault(name, one)
        if found.problem.removesuffix(DIFFER) != one.problem.removesuffix(DIFFER) or one.problem.endswith(DIFFER):
            found.problem = found.problem.removesuffix(DIFFER) + DIFFER
        return found

    @property
    def count(self) -> int:
        """How many rows have a problem."""
        return sum(kind.count for kind in self.kinds.values())

    def raise_any(
        self, source: Path, total: int, allowed: Callable[[Kind], bool] = lambda _: False, settled_by: str = ""
    ) -> None:
        """End with all that was noted about the rows of a source.

        Args:
            source: the file or folder.
            total: how many rows were read of it.
            allowed: whether a kind is no error.
            settled_by: the key that allows what is wrong with rows that are not too long.

        Raises:
            UserError: there was something.
        """
        kinds = [kind for kind in self.kinds.values() if not allowed(kind)]
        if not kinds:
            return
        count = sum(kind.count for kind in kinds)
        key = f"{count} of {total} rows"
        key_hint = "" if count == total or all(kind.is_overlong for kind in kinds) else settled_by
        if len(kinds) > 1:
            told = [f"{one.problem} ({_names(one)}{f'; {one.hint}' if one.hint else ''})" for one in kinds]
            raise UserError("; ".join(told), file=source, key=key, hint=key_hint)
        (kind,) = kinds
        problem, names = kind.problem, f"{key} ({_names(kind)})"
        if count == 1:
            (shown,) = kind.shown
            problem = f"{problem} ({shown.shown_by})" if shown.shown_by else problem
            names = f"row {shown.number}" if shown.file == source else f"{shown.file.name}: row {shown.number}"
        raise UserError(problem, file=source, key=names, hint="; ".join(filter(None, (kind.hint, key_hint))))

    def described(self) -> list[dict[str, Any]]:
        """As JSON: each kind, its count, and its first rows."""
        return [
            {
                "problem": kind.problem,
                "rows": kind.count,
                "first": [
                    {"file": one.file.name, "row": one.number, "shown_by": one.shown_by, "text": one.row}
                    for one in kind.shown
                ],
            }
            for kind in self.kinds.values()
        ]


def _names(kind: Kind) -> str:
    """`row 4: message 2`, or `rows 4: message 2, 9: message 1, 12: message 2 and 21 more`."""
    several = len({one.file for one in kind.shown}) > 1
    places = [f"{one.file.name} {one.number}" if several else str(one.number) for one in kind.shown]
    shown = [
        f"{place}: {one.shown_by}" if one.shown_by else place for place, one in zip(places, kind.shown, strict=True)
    ]
    more = f" and {kind.count - SHOWN} more" if kind.count > SHOWN else ""
    return f"row{'s' if kind.count > 1 else ''} {', '.join(shown)}{more}"


@dataclass
class Notes:
    """What is not as one might expect in the rows of a source, and is no error."""

    apart: int = 0
    begins_differently: int = 0
    without_end: int = 0
    cut: int = 0
    texts: int = 0
    skipped: int = 0
    chats: int = 0
    asking: int = 0
    """Chats that end with the user."""
    missing: Counter[str] = field(default_factory=Counter)
    """Answers that say no more than that a value is missing."""
    other_columns: set[str] = field(default_factory=set)

    def look_at(self, answer: Any) -> None:
        """Count an answer, a text or parts of one, that says no more than that a value is missing."""
        if isinstance(answer, list) and len(answer) == 1:
            answer = answer[0].get("text")
        if isinstance(answer, str) and (said := answer.strip()) in MISSING:
            self.missing[said] += 1

    def add(self, other: "Notes") -> None:
        """Add what was found in the rows that follow."""
        for name in ("apart", "begins_differently", "without_end", "cut", "texts", "skipped", "chats", "asking"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.missing += other.missing
        self.other_columns |= other.other_columns

    def lines(self) -> list[str]:
        """Each once, with its count."""
        differently = "answers that the chat template renders differently when messages follow"
        said = {
            f"{differently}: each is trained as a sequence of its own": self.apart,
            f"{differently}, which are not trained": self.skipped,
            "prompts that alone end in other tokens: loss begins at the first that differs": self.begins_differently,
            "answers that end without a special token: the model is not trained to stop": self.without_end,
            "sequences that were too long and are shortened (`overlong`)": self.cut,
            "texts, trained as they stand, without the chat template": self.texts,
        }
        found = [f"{count} {what}" for what, count in said.items() if count]
        if self.asking:
            ends = "ends" if self.asking == 1 else "end"
            found.append(f"{self.asking} of {self.chats} chats {ends} with the user, whose last turn is never trained")
        if self.missing:
            words, count = ", ".join(f"`{word}`" for word in sorted(self.missing)), self.missing.total()
            told = "answers are" if count > 1 else "answer is"
            found.append(f"{count} {told} only {words}: is a value missing there?")
        if self.other_columns:
            found.append(f"columns that are kept out: {', '.join(sorted(self.other_columns))}")
        return found
