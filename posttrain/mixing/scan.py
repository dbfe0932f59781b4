"""The first pass over a source: what each row says, whether it may stay, and what later steps need to know of it.

Rows are read as a stream and written off part by part, so that an attempt that was interrupted goes on at its last
part. Of each row 17 bytes stay in memory: its digest, its tokens, its verdict, its language and its licence. Signatures
of near duplicates stay on the disk.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cordee import files
from cordee.chat.formats import columns_of
from cordee.chat.problems import SHOWN, SHOWN_CHARACTERS, Problems
from cordee.chat.selection import files_of, selected
from cordee.chat.source import BadRows
from cordee.data.row import Row
from cordee.errors import Fault, UserError
from cordee.stage import Context
from posttrain.mixing import minhash, texts
from posttrain.mixing.decontamination import Match, Questions
from posttrain.mixing.settings import Licenses, MixtureSource
from posttrain.mixing.texts import RowText

PART_ROWS = 20_000
"""Rows of a part: what a kill can cost."""
KEPT, BAD, LICENCE, CONTAMINATED, DUPLICATE, NEAR_DUPLICATE = range(6)
"""Verdicts on a row."""
LICENCES, LANGUAGE = ("license", "licence"), "language"
COLUMNS = {"digest": np.uint64, "tokens": np.uint32, "verdict": np.uint8, "language": np.uint16, "licence": np.uint16}
Shown = dict[str, Any]
Encode = Callable[[list[str]], list[list[int]]]


@dataclass
class LeftOut:
    """The rows that were left out for one reason."""

    problem: str
    rows: int = 0
    first: list[Shown] = field(default_factory=list)
    """The first of them: `file`, `row`, `shown_by`, `text`."""

    def add(self, count: int, first: Sequence[Shown]) -> None:
        """Count further rows."""
        self.rows += count
        self.first += first[: SHOWN - len(self.first)]


@dataclass(frozen=True)
class Rules:
    """What is asked of rows."""

    bad_rows: BadRows
    licenses: Licenses | None
    encode: Encode | None
    """Gives token ids; None where nothing is counted in tokens."""
    questions: Questions | None
    """Benchmarks' questions, which no row may hold."""
    near: bool
    """Whether near duplicates are sought."""


@dataclass
class Scanned:
    """A source's rows after the first pass."""

    source: MixtureSource
    name: str
    columns: dict[str, npt.NDArray[Any]]
    """`[rows]` each, of the names in `COLUMNS`."""
    names: list[str]
    """The languages and licences that the columns number."""
    left_out: dict[str, LeftOut]
    by_task: dict[str, int]
    """Rows that hold a question, by its task."""
    signatures: list[Path]
    """Files `[rows of the part, HASHES]`, in the order of the rows."""

    def __len__(self) -> int:
        return len(self.columns["verdict"])

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """`[rows]`: whether no filter took a row away."""
        found: npt.NDArray[np.bool_] = self.columns["verdict"] == KEPT
        return found

    def leave_out(self, problem: str, count: int, first: Sequence[Shown] = ()) -> None:
        """Note rows that are left out."""
        if count or first:
            self.left_out.setdefault(problem, LeftOut(problem)).add(count, first)


def scan(source: MixtureSource, name: str, rules: Rules, context: Context, folder: Path) -> Scanned:
    """Read a source once.

    Args:
        source: what is read.
        name: what it is called.
        rules: what is asked of its rows.
        context: told of progress, and asked for a stop.
        folder: keeps finished parts until the stage ends.

    Raises:
        UserError: rows can't be used, and the rules don't allow it: how many, why, and the first three of each kind.
        Stopped: a stop was asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = files_of(source).documents
    rows = (row for batch in selected(source, found, context.seed) for row in batch)
    parts, problems, names, total = [], Problems(), list[str](), 0
    for number in itertools.count():
        part = list(itertools.islice(rows, PART_ROWS))
        if not part and number:
            break
        place = folder / f"{number:06}.json"
        if not place.exists():
            if context.stop_requested():
                context.stop(f"row {total} of {name}")
            one = _Part(source, name, rules, names)
            one.read(part, context, total)
            problems.add(one.problems)
            if rules.bad_rows == "drop" or not one.problems.count:
                one.write(place)
        if place.exists():
            parts.append(files.read_json(place))
            names = list(parts[-1]["names"])
        total += len(part)
        context.progress(total, max(total, 1), f"rows of {name}")
    settled = "`bad_rows: drop` leaves such rows out and counts them"
    problems.raise_any(source.path, total, lambda _: rules.bad_rows == "drop", settled)
    if not total:
        raise UserError("holds no rows", file=source.path, key="data")
    return _joined(source, name, parts, folder)


def shown(row: Row, values: Any, shown_by: str = "") -> Shown:
    """A row as an example, with its first characters."""
    text = json.dumps(values, ensure_ascii=False, default=str)[:SHOWN_CHARACTERS]
    return {"file": row.file.name, "row": row.number, "shown_by": shown_by, "text": text}


@dataclass
class _Part:
    """Some rows of a source that are being read."""

    source: MixtureSource
    name: str
    rules: Rules
    names: list[str]
    problems: Problems = field(default_factory=Problems)

    def read(self, rows: Sequence[Row], context: Context, before: int) -> None:
        """Read the rows, which follow so many, and judge them."""
        self.columns = {name: np.zeros(len(rows), kind) for name, kind in COLUMNS.items()}
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.signatures = np.zeros((len(rows) if self.rules.near else 0, minhash.HASHES), np.uint32)
        self.found = Scanned(self.source, self.name, self.columns, self.names, {}, {}, [])
        good: list[tuple[int, Row, RowText]] = []
        for at, row in enumerate(rows):
            self.columns["verdict"][at] = BAD
            with self.problems.of(row.file, row.number, row.values):
                values = columns_of(row, self.source)
                text = texts.read(values)
                if self._is_licensed(at, row, values):
                    good.append((at, row, text))
                    self.columns["verdict"][at] = KEPT
        for start in range(0, len(good), 1000):
            context.progress(before + start, before + len(rows), f"rows of {self.name}")
            self._measure(good[start : start + 1000])
        for kind in self.problems.described():
            self.found.leave_out(kind["problem"], kind["rows"], kind["first"])

    def _is_licensed(self, at: int, row: Row, values: dict[str, Any]) -> bool:
        """Note a row's language and licence; whether it may have that licence."""
        told = [values[name] for name in LICENCES if isinstance(values.get(name), str)] or [self.source.license]
        language = values.get(LANGUAGE) if isinstance(values.get(LANGUAGE), str) else self.source.language
        self.columns["licence"][at] = self._number(told[0] or "")
        self.columns["language"][at] = self._number(language or "")
        problem = self.rules.licenses.problem(told[0] or "") if self.rules.licenses else None
        if problem:
            self.columns["verdict"][at] = LICENCE
            self.found.leave_out(problem, 1, [shown(row, values)])
        return problem is None

    def _number(self, name: str) -> int:
        if name not in self.numbers:
            if len(self.numbers) > np.iinfo(np.uint16).max:
                raise Fault(f"more than {len(self.numbers)} languages and licences", file=self.source.path)
            self.numbers[name] = len(self.numbers)
            self.names.append(name)
        return self.numbers[name]

    def _measure(self, rows: Sequence[tuple[int, Row, RowText]]) -> None:
        """Digest, tokens and signature of rows, and the question that each holds."""
        said = [[texts.normalised(part) for part in (text.prompt, *text.answers)] for _, _, text in rows]
        plain = [" ".join(filter(None, parts)) for parts in said]
        encode, questions = self.rules.encode, self.rules.questions
        lengths = [len(ids) for ids in encode([text.whole for _, _, text in rows])] if encode else [0] * len(rows)
        matches: list[Match | None] = [None] * len(rows)
        if questions and encode:
            matches = [questions.find(ids) for ids in encode(plain)]
        for (at, row, own), parts, text, length, match in zip(rows, said, plain, lengths, matches, strict=True):
            self.columns["digest"][at], self.columns["tokens"][at] = texts.digest([*parts, own.beside]), length
            if match:
                self.columns["verdict"][at] = CONTAMINATED
                self._note(row, match)
            elif self.rules.near:
                self.signatures[at] = minhash.signature(text)

    def _note(self, row: Row, match: Match) -> None:
        task = match.question.task
        asked = f"{match.share:.0%} of “{match.question.text[:SHOWN_CHARACTERS]}”"
        values = columns_of(row, self.source)
        self.found.leave_out(f"holds a question of {task}", 1, [shown(row, values, asked)])
        self.found.by_task[task] = self.found.by_task.get(task, 0) + 1

    def write(self, place: Path) -> None:
        """Write what was found; `place` comes last."""
        for name, array in {**self.columns, **({"signatures": self.signatures} if self.rules.near else {})}.items():
            np.save(place.with_suffix(f".{name}.npy"), array)
        left_out = [vars(one) for one in self.found.left_out.values()]
        files.sync_folder(place.parent)
        files.write_json(place, {"names": self.names, "left_out": left_out, "by_task": self.found.by_task})


def _joined(source: MixtureSource, name: str, parts: Sequence[dict[str, Any]], folder: Path) -> Scanned:
    """All parts of a source as one."""
    places = [folder / f"{number:06}" for number in range(len(parts))]
    columns = {kind: np.concatenate([np.load(f"{place}.{kind}.npy") for place in places]) for kind in COLUMNS}
    signatures = [path for place in places if (path := Path(f"{place}.signatures.npy")).exists()]
    found = Scanned(source, name, columns, list(parts[-1]["names"]), {}, {}, signatures)
    for part in parts:
        for one in part["left_out"]:
            found.leave_out(one["problem"], one["rows"], one["first"])
        for task, count in part["by_task"].items():
            found.by_task[task] = found.by_task.get(task, 0) + count
    return found


def again(scanned: Scanned, seed: int) -> Iterator[tuple[int, Row]]:
    """The rows of a source once more, in the same order, each with its place."""
    source = scanned.source
    rows = (row for batch in selected(source, files_of(source).documents, seed) for row in batch)
    count = 0
    for at, row in enumerate(rows):
        count += 1
        yield at, row
    if count != len(scanned):
        raise Fault("changed while it was read", file=source.path)


def forget(folder: Path) -> None:
    """Delete the parts."""
    shutil.rmtree(folder, ignore_errors=True)
