"""Reads artifacts for a report: the manifests of all that the listed ones come from, and their result files.

Each file is compared with the hash in its manifest and checked for its shape before a number of it is used.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cordee import manifest
from cordee.errors import Fault
from cordee.manifest import Manifest

Column = tuple[str, str, str, str]
"""A task, the way in which it was asked, a metric and a filter of lm-eval."""


class Shape(BaseModel):
    """Base of what a file has to hold; a file may hold more."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Language(Shape):
    """A language of the corpus."""

    name: str
    script: str


class Corpus(Shape):
    """`corpus.json`."""

    languages: dict[str, Language]
    heldout_byte_entropy: float
    licences: dict[str, int] = {}


class Task(Shape):
    """What a benchmark asks, how, and how its values are read."""

    task: str
    asked: str
    """Names the way in which it was asked: `chat-5-shot`."""
    is_asked: bool = True
    """False for a task that was measured as part of a group."""
    is_group: bool = False
    shots: int | None = None
    version: float | str | None = None
    metric: str
    """What is shown first, of that filter."""
    filter: str = "none"
    higher_is_better: dict[str, bool]
    chance: float | None = None
    description: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Tells it from the same task asked in another way."""
        return self.task, self.asked

    @property
    def column(self) -> Column:
        """What of it is shown first."""
        return *self.key, self.metric, self.filter


class Figure(Shape):
    """One value of a task: of a metric and a filter of lm-eval."""

    task: str
    asked: str
    metric: str
    filter: str
    value: Annotated[float, Field(allow_inf_nan=False)]
    standard_error: float | None = None
    by_language: dict[str, float] = {}

    @property
    def column(self) -> Column:
        """What it is a value of."""
        return self.task, self.asked, self.metric, self.filter


class Engine(Shape):
    """What generated or scored."""

    name: str
    version: str = ""
    device: str = ""
    mode: str = ""
    dtype: str = ""


class ModelResults(Shape):
    """One model's values in a benchmark."""

    name: str
    tasks: list[Task]
    results: list[Figure]
    notes: dict[str, list[str]] = {}
    """By task: what lm-eval did with its texts that a reader should know."""

    def figure(self, column: Column) -> Figure | None:
        """Its value of a column, if it was measured."""
        return next((figure for figure in self.results if figure.column == column), None)


class Results(Shape):
    """`results.json`."""

    engine: Engine
    models: list[ModelResults]


class Sample(Shape):
    """One line of `samples.jsonl`."""

    prompt: str
    reference: str | None = None
    kind: str = ""
    language: str = ""
    outputs: dict[str, str]
    rewards: dict[str, float] = {}
    """Of those of them that were scored."""


class ShownRow(Shape):
    """A row that shows why it was left out."""

    file: str
    row: int
    shown_by: str
    text: str


class LeftOut(Shape):
    """The rows of a source that were left out for one reason."""

    problem: str
    rows: int
    first: list[ShownRow]


class Source(Shape):
    """What a training has read of one file or folder."""

    path: str
    rows: int
    sequences: int
    tokens: int | None = None
    """None where they were not counted."""
    loss_tokens: int | None = None
    left_out: list[LeftOut] = []


class ModelConfig(Shape):
    """A model's `config.json`."""

    architectures: list[str] | None = None


class Sources(Shape):
    """`rows.json`."""

    sources: list[Source]


AnyShape = TypeVar("AnyShape", bound=BaseModel)


@dataclass(frozen=True)
class Record:
    """An artifact's folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """How recipes refer to it: `quickstart/base@1`."""
        return self.manifest.name

    def holds(self, file: str) -> bool:
        """Whether the artifact has a file of that name."""
        return any(item.path == file for item in self.manifest.files)

    def read(self, file: str, shape: type[AnyShape]) -> AnyShape:
        """A JSON file of the artifact.

        Raises:
            Fault: it is missing, differs from its hash, or holds something else.
        """
        return _parse(self.content(file), shape, self.path / file)

    def rows(self, file: str) -> list[dict[str, Any]]:
        """A file of JSON lines; NaN and infinities are read as None.

        Raises:
            Fault: it is missing, differs from its hash, or a line is no JSON object.
        """
        rows = []
        for number, line in self._lines(file):
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise Fault(f"line {number} is no JSON: {error}", file=self.path / file) from error
            if not isinstance(row, dict):
                raise Fault(f"line {number} is no JSON object", file=self.path / file)
            rows.append({key: None if _is_infinite(value) else value for key, value in row.items()})
        return rows

    def samples(self) -> list[Sample]:
        """The rows of `samples.jsonl`.

        Raises:
            Fault: it is missing, differs from its hash, or a line holds something else.
        """
        file = "samples.jsonl"
        return [_parse(line, Sample, f"{self.path / file}, line {number}") for number, line in self._lines(file)]

    def _lines(self, file: str) -> Iterator[tuple[int, bytes]]:
        """The lines of a file that hold something, numbered; U+2028 ends none."""
        return ((number, line) for number, line in enumerate(self.content(file).split(b"\n"), 1) if line.strip())

    def content(self, file: str) -> bytes:
        """The bytes of a file, after their hash was compared with the manifest's."""
        path = self.path / file
        listed = {item.path: item.sha256 for item in self.manifest.files}
        if file not in listed:
            raise Fault("is not in the artifact's manifest", file=path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise Fault(f"can't be read: {error.strerror}", file=path) from error
        if hashlib.sha256(content).hexdigest() != listed[file]:
            raise Fault("its content differs from the manifest's SHA-256", file=path)
        return content


def open_record(path: Path) -> Record:
    """The artifact that a folder is, or that a place lies in.

    Raises:
        Fault: there is none, or its manifest is damaged.
    """
    folder = manifest.around(path)
    if folder is None:
        raise Fault("lies in no artifact", file=path)
    return Record(folder, manifest.read(folder))


def pipeline(listed: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """The listed artifacts and all that they come from, each after what it was made from.

    Returns:
        the records, and the names of those that are no longer in the store, or damaged.

    Raises:
        Fault: a folder of the store holds another artifact than the one that was read.
    """
    order: dict[str, Record] = {}
    missing: list[str] = []
    known = {record.name: record for record in listed}

    def visit(record: Record) -> None:
        if record.name in order:
            return
        for source in record.manifest.inputs:
            if not source.artifact:
                continue
            folder = record.path.parent.parent / source.artifact
            try:
                ancestor = known.get(source.artifact) or open_record(folder)
            except Fault:
                missing.extend({source.artifact} - set(missing))
                continue
            known[source.artifact] = ancestor
            if ancestor.manifest.fingerprint != source.fingerprint:
                raise Fault(f"is not the {source.artifact} that {record.name} was made from", file=ancestor.path)
            visit(ancestor)
        order[record.name] = record

    for record in listed:
        visit(record)
    return list(order.values()), missing


def _parse(content: bytes, shape: type[AnyShape], file: object) -> AnyShape:
    """Check the shape of JSON."""
    try:
        return shape.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise Fault(f"can't be used: {first['msg']}", file=file, key=key or None) from error


def _is_infinite(value: Any) -> bool:
    """Whether a value is a float that JSON can't hold."""
    return isinstance(value, float) and not math.isfinite(value)
