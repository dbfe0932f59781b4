"""Answers of one or several sources, put together by their prompts: what a reward compares, and what pairs are made of.

The rows are copied to a file as they are read, and found again by their places in it: memory holds a few bytes of each.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cordee import files
from cordee.chat import formats
from cordee.chat.problems import BadRowError, Problems
from cordee.chat.schema import OPTIONS
from cordee.chat.selection import files_of, selected
from cordee.chat.source import BadRows, Source
from cordee.chat.values import without_nulls
from cordee.errors import UserError
from cordee.stage import Context
from posttrain.rewards.texts import text_of

ROWS, INDEX = "rows.jsonl", "index.npz"
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Answer:
    """A row with a prompt and an answer to it."""

    file: Path
    number: int
    values: dict[str, Any]
    """The row as it was read, without nulls."""
    prompt: Any
    """A text, or messages."""
    completion: Any
    """A text, or a list of one message."""
    source: int
    """The place of its source among all."""

    @property
    def text(self) -> str:
        """What it says."""
        return text_of(self.completion)

    @property
    def is_empty(self) -> bool:
        """Whether it neither says anything nor calls a tool."""
        calls = not isinstance(self.completion, str) and any(one.get("tool_calls") for one in self.completion)
        return not self.text.strip() and not calls


class Answers:
    """The prompts, in the order in which they come first, each with its answers."""

    def __init__(self, folder: Path, sources: Sequence[Source], places: Sequence[Places], left_out: Any) -> None:
        """Prompts whose rows begin at these places of the file that `gather` wrote."""
        self._file, self._sources, self._places = folder / ROWS, sources, places
        self.left_out: list[dict[str, Any]] = left_out
        """Rows that can't be used, by kind."""

    def __len__(self) -> int:
        return len(self._places)

    @property
    def rows(self) -> int:
        """How many answers there are."""
        return sum(map(len, self._places))

    def groups(self, first: int = 0, end: int | None = None) -> Iterator[list[Answer]]:
        """The answers to each of the prompts from `first` up to `end`."""
        with self._file.open("rb") as opened:
            for places in self._places[first:end]:
                yield [self._read(opened, int(place)) for place in places]

    def models(self) -> set[str]:
        """The models that the rows name, those of other partitions too; "None" of rows that name none."""
        with self._file.open("rb") as opened:
            return {str(json.loads(line)[3].get("model")) for line in opened}

    def _read(self, opened: io.BufferedReader, place: int) -> Answer:
        opened.seek(place)
        at, file, number, values = json.loads(opened.readline())
        return Answer(Path(file), number, values, *split(values, as_text=self._sources[at].as_text), at)

    def share(self, which: int, of: int) -> "Answers":
        """Every `of`-th prompt, from the one at place `which` on, counted from 1."""
        return Answers(self._file.parent, self._sources, self._places[which - 1 :: of], self.left_out)


def split(values: dict[str, Any], *, as_text: bool) -> tuple[Any, Any]:
    """A row's prompt and its answer: two texts, or two lists of messages, the second with one.

    A prompt and a completion that are strings are the turns of a chat, unless they are to be taken `as_text`.

    Raises:
        BadRowError: it has no shape of a chat, or no answer.
    """
    shaped = formats.chat({name: value for name, value in values.items() if name != "label"}, as_text=as_text)
    if isinstance(shaped, formats.Text):
        if not shaped.prompt:
            raise BadRowError("is a text, and a prompt with its answer is needed")
        return shaped.prompt, shaped.completion
    messages = shaped["messages"]
    is_answered = isinstance(messages, list) and len(messages) > 1 and isinstance(messages[-1], dict)
    if not is_answered or messages[-1].get("role") != "assistant":
        raise BadRowError("has no answer: its last message is not the assistant's, or stands alone")
    return messages[:-1], messages[-1:]


def gather(
    sources: Sequence[Source],
    folder: Path,
    context: Context,
    bad_rows: BadRows,
    check: Callable[[Answer], object] | None = None,
) -> Answers:
    """Read all rows, and put those with the same prompt (and the same tools) together.

    Args:
        sources: what is read.
        folder: gets the rows, or has them from an attempt before.
        context: told of progress, and asked for a stop.
        bad_rows: what becomes of rows that can't be used.
        check: raises BadRowError of a row that can't be used.

    Raises:
        UserError: rows can't be used, or none is left.
        Stopped: a stop was asked for.
    """
    for at, source in enumerate(sources):
        if source.weight != 1:
            raise UserError("is for training", key=f"data.{at}.weight", hint="leave it out")
    if not (folder / INDEX).exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(sources, folder, context, bad_rows, check)
    with np.load(folder / INDEX) as index:
        groups, starts = index["groups"], index["starts"]
    order = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.diff(groups[order])) + 1
    told = files.read_json(folder / "left_out.json")
    return Answers(folder, sources, np.split(starts[order], bounds), told)


def _write(
    sources: Sequence[Source],
    folder: Path,
    context: Context,
    bad_rows: BadRows,
    check: Callable[[Answer], object] | None,
) -> None:
    """Write the rows; the index comes last."""
    known: dict[bytes, int] = {}
    groups, starts, place = [], [], 0
    left_out: list[dict[str, Any]] = []
    with (folder / ROWS).open("wb") as out:
        for at, source in enumerate(sources):
            problems, count = Problems(), 0
            context.waits(f"the rows of {source.path.name}")
            for rows in selected(source, files_of(source).documents, context.seed):
                context.stop_if_asked(f"row {count} of {source.path.name}")
                for row in rows:
                    count += 1
                    with problems.of(row.file, row.number, row.values):
                        values = without_nulls(formats.columns_of(row, source))
                        answer = Answer(row.file, row.number, values, *split(values, as_text=source.as_text), at)
                        if check is not None:
                            check(answer)
                        line = json.dumps([at, str(row.file), row.number, values], ensure_ascii=False, default=str)
                        groups.append(known.setdefault(_key(answer), len(known)))
                        starts.append(place)
                        place += out.write(line.encode("utf-8", "surrogatepass") + b"\n")
            settled = "`bad_rows: drop` leaves such rows out and counts them"
            problems.raise_any(source.path, count, lambda _: bad_rows == "drop", settled)
            left_out += problems.described()
            for kind in problems.kinds.values():
                context.note(f"{source.path.name}: {kind.count} rows left out: {kind.problem}")
    if not groups:
        raise UserError("holds no answer that can be used", file=sources[0].path, key="data")
    files.write_json(folder / "left_out.json", left_out)
    with (folder / f".{INDEX}").open("wb") as index:
        np.savez(index, groups=np.array(groups, np.int64), starts=np.array(starts, np.int64))
    (folder / f".{INDEX}").replace(folder / INDEX)


def _key(answer: Answer) -> bytes:
    """Tells prompts apart: by what is rendered, and not by the order of keys or by what would be trained on."""
    prompt = answer.prompt
    if not isinstance(prompt, str):
        prompt = [{key: value for key, value in one.items() if key not in ("train", "weight")} for one in prompt]
    told = [prompt, *(answer.values.get(name) for name in OPTIONS)]
    line = json.dumps(told, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(line.encode("utf-8", "surrogatepass")).digest()[:16]
