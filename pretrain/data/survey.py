"""What is found in a corpus's files before anything is written: rows that can't be documents, types, duplicates."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cordee.stage import Context
from pretrain.data.columns import Types, widen
from pretrain.data.reading import Bad, Chunk, chunks, words
from pretrain.data.selection import Selection, Value, compared, is_value

SAMPLES = 3
"""Rows of each kind that are shown."""

Numbers = npt.NDArray[np.uint64]


class Digests:
    """64 bits of each text's hash, in the order in which they came: eight bytes a text."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._numbers = array("Q")
        self.add(texts)

    def __len__(self) -> int:
        """How many texts there were."""
        return len(self._numbers)

    def add(self, texts: Iterable[str]) -> None:
        """Add those of some texts."""
        for text in texts:
            self._numbers.append(int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little"))

    def numbers(self) -> Numbers:
        """`[texts]`: a copy."""
        return np.array(self._numbers, dtype=np.uint64)


def are_in(some: Numbers, known: Numbers) -> npt.NDArray[np.bool_]:
    """Which of some numbers are among the known ones, which are sorted."""
    if not len(known):
        return np.zeros(len(some), dtype=bool)
    places = np.minimum(np.searchsorted(known, some), len(known) - 1)
    found: npt.NDArray[np.bool_] = np.equal(known[places], some)
    return found


@dataclass
class BadRows:
    """The rows that can't be documents, counted by what is wrong with them, the first of each kept."""

    of: int = 0
    """Rows that were read, good ones and bad ones."""
    counts: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[Bad]] = field(default_factory=dict)

    def add(self, rows: Iterable[Bad]) -> None:
        """Count some rows."""
        for row in rows:
            self.counts[row.problem] += 1
            if self.counts[row.problem] <= SAMPLES:
                self.samples.setdefault(row.problem, []).append(row)

    def shown(self, source: Path) -> str:
        """All of them in one line: `2 of 90 rows can't be documents: 2 empty text (line 3, line 9)`."""
        kinds = ", ".join(
            f"{count} {problem} ({', '.join(_place(row, source) for row in self.samples[problem])}"
            f"{', …' if count > SAMPLES else ''})"
            for problem, count in self.counts.most_common()
        )
        are = "documents" if self.counts.total() > 1 else "a document"
        return f"{self.counts.total()} of {self.of} row{'s' if self.of > 1 else ''} can't be {are}: {kinds}"

    @property
    def hint(self) -> str:
        """What the first one that has a hint says."""
        return next((row.hint for rows in self.samples.values() for row in rows if row.hint), "")

    def described(self, source: Path) -> dict[str, Any]:
        """What `corpus.json` says of them."""
        return {
            problem: {
                "rows": count,
                "samples": [{"place": _place(row, source), "row": row.row} for row in self.samples[problem]],
            }
            for problem, count in self.counts.most_common()
        }


def _place(row: Bad, source: Path) -> str:
    """The place of a row; with its file if the source is a folder."""
    return row.place if row.file == source else f"{_name(row.file, source)} {row.place}"


@dataclass
class Survey:
    """The contents of all files of a corpus."""

    files: Sequence[Path]
    unmatched: set[tuple[str, Value]]
    """Pairs of `holdout` that no document has."""
    tags: Counter[str] = field(default_factory=Counter)
    """Documents of each language, "" where there is none, those that are not kept included."""
    types: Types = field(default_factory=dict)
    bad: BadRows = field(default_factory=BadRows)
    texts: Digests = field(default_factory=Digests)
    """Of the documents that are kept, file by file."""
    ends: list[int] = field(default_factory=list)
    """For each file, how many documents are kept of it and the files before it."""
    heldout: Digests = field(default_factory=Digests)
    """Of the documents that are held out."""

    def add(self, chunk: Chunk, selection: Selection) -> None:
        """Add a chunk."""
        self.bad.of += len(chunk.texts) + len(chunk.bad)
        self.bad.add(chunk.bad)
        self.tags.update(words(chunk.values("language")))
        kept = selection.kept(chunk)
        widen(self.types, kept)
        self.texts.add(kept.texts)
        are_held_out = selection.are_held_out(kept)
        self.heldout.add(text for text, held in zip(kept.texts, are_held_out, strict=True) if held)
        for column in {column for column, _ in self.unmatched}:
            values = compared(kept, column)
            self.unmatched -= {
                (name, wanted)
                for name, wanted in self.unmatched
                if name == column and any(is_value(value, wanted) for value in values)
            }


def take(files: Sequence[Path], selection: Selection, context: Context) -> Survey:
    """Read all files to their ends.

    Raises:
        UserError: a file can't be read.
        Stopped: a stop was asked for.
    """
    survey = Survey(files, {(column, value) for column, values in selection.holdout.items() for value in values})
    for file in files:
        for chunk in chunks(file):
            survey.add(chunk, selection)
            context.stop_if_asked(f"document {len(survey.texts)}")
        survey.ends.append(len(survey.texts))
    return survey


@dataclass(frozen=True)
class Duplicates:
    """Documents whose text appeared in the corpus before."""

    within: int
    """In the same file."""
    between: dict[tuple[int, int], int]
    """(file, the earlier file that it repeats) → how many, the most first."""

    @property
    def total(self) -> int:
        """How many there are."""
        return self.within + sum(self.between.values())


def duplicates(survey: Survey) -> Duplicates:
    """Count the documents whose text appeared before, by the file in which it appeared first."""
    numbers = survey.texts.numbers()
    order = np.argsort(numbers, kind="stable")  # equal texts side by side, each group in the documents' order
    repeats = np.flatnonzero(np.equal(numbers[order][1:], numbers[order][:-1])) + 1
    first = np.arange(len(order))
    first[repeats] = 0
    first = np.maximum.accumulate(first)  # where each group begins in `order`
    files, firsts = (
        np.searchsorted(survey.ends, order[places], side="right").tolist() for places in (repeats, first[repeats])
    )
    pairs = Counter(zip(files, firsts, strict=True))
    within = sum(count for (file, earlier), count in pairs.items() if file == earlier)
    return Duplicates(within, {pair: count for pair, count in pairs.most_common() if pair[0] != pair[1]})


def shown(survey: Survey, found: Duplicates, source: Path) -> str:
    """How many documents repeat others and which files the most, in one line."""
    sizes = np.diff([0, *survey.ends])
    parts = [f"{found.within} within a file"] if found.within else []
    parts += [
        f"{count} of the {sizes[file]} of {_name(survey.files[file], source)} are in "
        f"{_name(survey.files[earlier], source)} too"
        for (file, earlier), count in list(found.between.items())[:SAMPLES]
    ]
    more = ", …" if len(found.between) > SAMPLES else ""
    return f"{found.total} documents repeat the text of another and are kept: {', '.join(parts)}{more}"


def _name(file: Path, source: Path) -> str:
    return file.relative_to(source).as_posix()
