"""Passages of a corpus, cut at word boundaries, none of which occurs in a held-out document."""

import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cordee.errors import Fault, UserError, nearest

COLUMNS = ("text", "language", "language_name", "script", "article")
TRIES = 200
VIRAMA = 9
"""Unicode combining class of the signs that join two letters."""


@dataclass
class Language:
    """A language of the corpus, with its documents in both splits."""

    tag: str
    name: str
    script: str
    train: list[str] = field(default_factory=list)
    heldout: list[tuple[str, int | None]] = field(default_factory=list)
    """Text and article."""


def read(corpus: Path, tags: Sequence[str] | None) -> list[Language]:
    """The languages of a corpus, sorted by tag; all, or those with the given tags.

    Raises:
        UserError: the corpus lacks a file, a column, one of the languages, its name or its held-out text.
    """
    found: dict[str, Language] = {}
    for split in ("train", "heldout"):
        for row in _rows(corpus / f"{split}.parquet"):
            if tags is None or row["language"] in tags:
                new = Language(row["language"], row["language_name"], row["script"])
                language = found.setdefault(row["language"], new)
                if split == "train":
                    language.train.append(row["text"])
                else:
                    language.heldout.append((row["text"], row["article"]))
    for tag in tags or found:
        if tag not in found:
            raise UserError(f"has no language {tag!r}", file=corpus, key="languages", hint=nearest(tag, found))
        for what, value in (("name", found[tag].name), ("held-out document", found[tag].heldout)):
            if not value:
                raise UserError(f"language {tag!r} has no {what}", file=corpus, key="languages")
    return [found[tag] for tag in sorted(found)]


def _rows(file: Path) -> list[dict[str, Any]]:
    """The documents of one split."""
    if not file.is_file():
        raise UserError(f"is no corpus: it has no {file.name}", file=file.parent, key="corpus")
    if missing := set(COLUMNS) - set(names := pq.read_schema(file).names):
        raise UserError(f"has no column {min(missing)!r}", file=file, hint=nearest(min(missing), names))
    rows: list[dict[str, Any]] = pq.read_table(file, columns=list(COLUMNS)).to_pylist()
    return rows


class Passages:
    """Draws random passages of training documents that do not occur in a held-out document.

    All substrings of `shortest` characters of the held-out texts are kept in a set. A passage is searched for only if
    its first `shortest` characters are in that set.
    """

    def __init__(self, languages: Sequence[Language], shortest: int, longest: int) -> None:
        self.shortest, self.longest = shortest, longest
        self.refused = 0
        """Number of passages rejected because they occur in a held-out document."""
        self._heldout = [text for language in languages for text, _ in language.heldout]
        self._known = {
            text[start : start + shortest]
            for text in self._heldout
            for start in range(max(len(text) - shortest + 1, 1))
        }

    def is_held_out(self, passage: str) -> bool:
        """Whether a passage occurs in a held-out document, of any language."""
        return passage[: self.shortest] in self._known and any(passage in text for text in self._heldout)

    def draw(self, language: Language, rng: random.Random) -> str:
        """A passage of random length from a language's training documents.

        Raises:
            UserError: no document is long enough, or `TRIES` passages were drawn and all occur in held-out documents.
        """
        documents = [text for text in language.train if len(text) >= self.shortest]
        for _ in range(TRIES if documents else 0):
            text = rng.choice(documents)
            length = rng.randint(self.shortest, min(self.longest, len(text)))
            passage = cut(text, rng.randint(0, len(text) - length), length)
            if len(passage) < self.shortest:
                continue
            if not self.is_held_out(passage):
                return passage
            self.refused += 1
        raise UserError(
            f"language {language.tag!r} has no training passage of {self.shortest} characters that is not held out",
            key="passage_characters",
        )

    def halve(self, passage: str) -> tuple[str, str]:
        """The first part of a passage and the rest, both stripped and not empty."""
        opening = cut(passage, 0, max(len(passage) * 3 // 5, 1))
        return opening, passage[len(opening) :].strip()

    def check(self, passages: Sequence[str]) -> None:
        """Check all passages before they are written.

        Raises:
            Fault: a passage occurs in a held-out document.
        """
        for passage in passages:
            if self.is_held_out(passage):
                raise Fault(f"a training passage occurs in a held-out document: {passage!r}")


def cut(text: str, start: int, length: int) -> str:
    """At most `length` characters from `start` on, aligned to word boundaries.

    In scripts without spaces (Chinese, Thai, Tibetan) it is cut between letters, never between a letter and its marks.
    """
    end = min(start + length, len(text))
    if start > 0 and not text[start - 1].isspace():
        space = _next_space(text, start, end)
        start = space if space is not None else _letter(text, start)
    if end < len(text) and not text[end].isspace():
        spaces = [place for place in range(start + 1, end) if text[place].isspace()]
        end = spaces[-1] if spaces and spaces[-1] - start >= (end - start) // 2 else _letter(text, end, step=-1)
    return text[start:end].strip()


def _next_space(text: str, start: int, end: int) -> int | None:
    """The first space in the first half of a passage."""
    return next((place for place in range(start, start + (end - start) // 2) if text[place].isspace()), None)


def _letter(text: str, place: int, step: int = 1) -> int:
    """The nearest position in one direction that does not separate a letter from its marks."""
    while 0 < place < len(text) and (
        unicodedata.category(text[place]).startswith("M")
        or text[place] == "\u200d"
        or text[place - 1] == "\u200d"
        or unicodedata.combining(text[place - 1]) == VIRAMA
    ):
        place += step
    return place
