"""The rows of a source in token ids, on the disk: rendered once, in parallel, and found again by their content.

    rows → batches → workers (shape, template, tokens, loss) → sequences.arrow, report.json

Memory does not grow with the source: rows are read in batches, and the sequences are memory-mapped. The folder's name
is a digest of all that decides about its content: the files, the tokenizer and its template, the rules, this code.
"""

import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import shutil
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cordee import files, hashes, machine
from cordee.chat import answers, columns, pairs, prompts, repeats
from cordee.chat.answers import TokenAnswer
from cordee.chat.conversations import Conversation, Encoder
from cordee.chat.pairs import TokenPair
from cordee.chat.problems import Kind, Notes, Problems
from cordee.chat.prompts import Prompt
from cordee.chat.selection import files_of, selected
from cordee.chat.source import Of, Rules, Source
from cordee.chat.spans import Answer
from cordee.data.folder import shown
from cordee.data.kinds import kind
from cordee.data.row import Row
from cordee.errors import Fault, UserError
from cordee.stage import Context

VERSION = 4
"""Raised when the same rows become other sequences."""
PARALLEL_BYTES = 16_000_000
"""Size of the files from which several processes are worth their start, which takes seconds."""
AHEAD = 4
"""Batches per worker that wait for it or for their turn."""
SEQUENCES, REPORT = "sequences.arrow", "report.json"
TOKENS = [f"{name}_hash" for name in dict.fromkeys(name for names in columns.TOKENS.values() for name in names)]
"""The columns of hashes of token ids."""


@dataclass
class Encoded:
    """What became of a batch of rows."""

    sequences: pa.RecordBatch
    """Of each: its file's place among the source's, its row's number, and the lists and numbers of `columns`."""
    rows: int
    problems: Problems
    notes: Notes


class Tokenized:
    """The sequences of a source, memory-mapped."""

    def __init__(self, folder: Path, found: Sequence[Path]) -> None:
        """Open a folder that `tokenize` has written of these files."""
        self.files = found
        self.report: dict[str, Any] = files.read_sealed(folder / REPORT)
        """Rows, sequences, tokens, what was left out and what is to be noted, and the content's digest."""
        opened = pa.ipc.open_file(pa.memory_map(str(folder / SEQUENCES)))
        self._batches = [opened.get_batch(at) for at in range(opened.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def numbers(self, name: str) -> npt.NDArray[np.int64]:
        """`[sequences]`: a column of numbers, such as `number`, the row in the file."""
        whole: npt.NDArray[Any] = np.concatenate([batch.column(name).to_numpy() for batch in self._batches])
        return whole.astype(np.int64)

    def floats(self, name: str) -> npt.NDArray[np.float64]:
        """`[sequences]`: a column of numbers that rows tell, such as `reward`; NaN where one does not."""
        found: npt.NDArray[np.float64] = np.concatenate([batch.column(name).to_numpy() for batch in self._batches])
        return found

    def items(self, name: str, at: int) -> npt.NDArray[Any]:
        """`[items]`: a list of a sequence, such as its `ids`, int32; of a row's text uint8."""
        part = int(np.searchsorted(self._starts, at, side="right")) - 1
        offsets, values = self._flat[name][part]
        within = at - int(self._starts[part])
        found: npt.NDArray[Any] = values[offsets[within] : offsets[within + 1]]
        return found

    def lengths(self, name: str) -> npt.NDArray[np.int64]:
        """`[sequences]`: how many items a list has."""
        found: npt.NDArray[np.int64] = np.concatenate([np.diff(offsets) for offsets, _ in self._flat[name]])
        return found

    def texts(self) -> npt.NDArray[np.int64]:
        """`[sequences]`: hashes of their token ids, the same for the same ids."""
        return self._together(name for name in TOKENS if name in self._names)

    def prompts(self) -> npt.NDArray[np.int64]:
        """`[sequences]`: hashes of the ids of their prompts; of chats, which are one list, as `texts`."""
        return self._together(["prompt_hash"]) if "prompt_hash" in self._names else self.texts()

    def _together(self, names: Iterable[str]) -> npt.NDArray[np.int64]:
        return repeats.together(*(self.numbers(name) for name in names)).view(np.int64)

    def told(self) -> Mapping[str, npt.NDArray[Any]]:
        """`[sequences]` each: all columns that are no lists."""
        return columns.numbers(self._batches)

    @cached_property
    def _names(self) -> set[str]:
        return {*self._batches[0].schema.names}

    @cached_property
    def _flat(self) -> dict[str, list[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]]:
        names = [name for name, kind in zip(self._batches[0].schema.names, self._batches[0].schema.types, strict=True)
                 if pa.types.is_large_list(kind)]  # fmt: skip
        return {
            name: [
                (batch.column(name).offsets.to_numpy(), batch.column(name).values.to_numpy()) for batch in self._batches
            ]
            for name in names
        }

    def digest(self) -> str:
        """The SHA-256 of all lists, which are nearly all that the folder holds."""
        found = hashlib.sha256()
        for batch in self._batches:
            _add(found, batch)
        return found.hexdigest()

    def conversation(self, at: int) -> Conversation:
        """A sequence of chats, by its place."""
        ids, loss = self.items("ids", at), self.items("loss", at)
        has_loss = np.zeros(len(ids), dtype=bool)
        for first, until in loss.reshape(-1, 2):
            has_loss[first:until] = True
        answers = tuple(
            Answer(int(message), int(first), int(end), int(until), trains=True)
            for message, first, end, until in self.items("answers", at).reshape(-1, 4)
        )
        file, number, messages, is_cut = (self._number(name, at) for name in ("file", "number", "messages", "is_cut"))
        return Conversation(self.files[file], number, messages, ids, has_loss, answers, bool(is_cut))

    def pair(self, at: int) -> TokenPair:
        """A sequence of pairs, by its place."""
        sides = (self.items(name, at).tolist() for name in columns.TOKENS["pairs"])
        told = (self._told(name, at) for name in columns.NUMBERS["pairs"])
        return TokenPair(self.files[self._number("file", at)], self._number("number", at), *sides, *told)

    def answer(self, at: int) -> TokenAnswer:
        """A sequence of answers, by its place."""
        prompt, completion = (self.items(name, at).tolist() for name in columns.TOKENS["scored"])
        label, reward, logprob = (self._told(name, at) for name in ("label", "reward", "reference_logprob"))
        rewards = tuple(self.items("reference_rewards", at).tolist()) if "reference_rewards" in self._names else ()
        file, number = self.files[self._number("file", at)], self._number("number", at)
        return TokenAnswer(file, number, prompt, completion, label, reward, logprob, rewards)

    def value(self, name: str, at: int) -> float:
        """A number of a sequence that its row tells; NaN where it does not."""
        part = int(np.searchsorted(self._starts, at, side="right")) - 1
        return float(self._batches[part].column(name)[at - int(self._starts[part])].as_py())

    def _told(self, name: str, at: int) -> float | None:
        value = self.value(name, at) if name in self._names else math.nan
        return None if math.isnan(value) else value

    def prompt(self, at: int) -> Prompt:
        """A prompt, by its place."""
        row: dict[str, Any] = json.loads(self.items(columns.TEXT, at).tobytes())
        return Prompt(self.files[self._number("file", at)], self._number("number", at), self.items("ids", at), row)

    def _number(self, name: str, at: int) -> int:
        return int(self.value(name, at))


def tokenize(of: Of, tokenizer: Any, source: Source, rules: Rules, context: Context, cache: Path) -> Tokenized:
    """A source's rows in tokens: found in the cache, or made there.

    Args:
        of: what the rows have to be: `chats` (texts too), `pairs`, answers that are `labelled` or `scored`,
            or `prompts`.
        tokenizer: its chat template renders the rows.
        source: what is read.
        rules: what becomes of rows that can't be used or are too long.
        context: told of progress, and asked for a stop.
        cache: a folder that keeps sequences from one start to the next.

    Raises:
        UserError: rows can't be used, and the rules don't allow it: how many, why, and the first three of each kind.
        Stopped: a stop was asked for.
    """
    chosen = files_of(source)
    if source.path.is_dir():
        context.note(shown(source.path, chosen))
    found = chosen.documents
    encoder = Encoder.of(tokenizer, source, rules)
    folder = cache / _name(of, encoder, found, context.seed)
    told = _whole(folder, found)
    if told is None:
        beside = cache / f".{folder.name}.{uuid.uuid4().hex[:8]}"
        beside.mkdir(parents=True)
        try:
            _write(of, encoder, found, context, beside)
            if _whole(folder, found) is None:  # another run may have made the same meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        told = Tokenized(folder, found)
    os.utime(folder)  # when it was last used, for `cordee clean`
    for line in told.report["notes"]:
        context.note(f"{source.path.name}: {line}")
    return told


def _whole(folder: Path, found: Sequence[Path]) -> Tokenized | None:
    """What a folder holds, if it is there and has not changed since it was written."""
    try:
        told = Tokenized(folder, found)
    except (Fault, OSError, pa.ArrowException):
        return None
    return told if told.digest() == told.report["digest"] else None


def _name(of: Of, encoder: Encoder, found: Sequence[Path], seed: int) -> str:
    """A name for all that decides about the sequences."""
    source, tokenizer = encoder.source, encoder.tokenizer
    template = encoder.template
    told = {
        "version": [VERSION, *(importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2"))],
        "of": of,
        "files": [(*kind(file), hashes.of_file(file)) for file in found],
        "source": source.model_dump(mode="json", exclude={"path", "files", "split", "subset", "weight"}),
        "seed": seed if source.shuffle else None,
        "tokenizer": [
            type(tokenizer).__name__,
            tokenizer.backend_tokenizer.to_str(),
            str(tokenizer.special_tokens_map),
        ],
        "template": tokenizer.chat_template,
        "rules": asdict(encoder.rules),
        "date": str(template.now.date()) if template is not None and template.writes_date else None,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def _write(of: Of, encoder: Encoder, found: Sequence[Path], context: Context, folder: Path) -> None:
    """Write the sequences, and the report last."""
    rules, source = encoder.rules, encoder.source
    problems, notes, counts, digest = Problems(), Notes(), Counter[str](), hashlib.sha256()
    with pa.OSFile(str(folder / SEQUENCES), "wb") as sink, pa.ipc.new_file(sink, columns.schema(of)) as writer:
        for part in _parts(of, encoder, found, context):
            if counts["rows"]:
                context.stop_if_asked(f"row {counts['rows']} of {source.path.name}")
            problems.add(part.problems)
            notes.add(part.notes)
            counts.update(rows=part.rows, **columns.counts(of, part.sequences))
            _add(digest, part.sequences)
            writer.write_batch(part.sequences)
    if not counts["rows"]:
        raise UserError("holds no rows", file=source.path)

    def is_allowed(kind: Kind) -> bool:
        return (rules.overlong if kind.is_overlong else rules.bad_rows) != "error"

    problems.raise_any(source.path, counts["rows"], is_allowed, "`bad_rows: drop` leaves such rows out and counts them")
    if not counts["sequences"]:
        kinds = "; ".join(f"{kind.count} {kind.problem}" for kind in problems.kinds.values())
        raise UserError(f"no row of {counts['rows']} is left: {kinds}", file=source.path)
    report = {
        **counts,
        "left_out": problems.described(),
        "notes": _lines(problems, notes),
        "digest": digest.hexdigest(),
    }
    files.sync_tree(folder)
    files.write_sealed(folder / REPORT, report)


def _add(digest: "hashlib._Hash", batch: pa.RecordBatch) -> None:
    """Add a batch's columns to a digest."""
    for name in batch.schema.names:
        column = batch.column(name)
        for part in (column.offsets, column.values) if pa.types.is_large_list(column.type) else (column,):
            digest.update(np.ascontiguousarray(part.to_numpy()).data)


def _lines(problems: Problems, notes: Notes) -> list[str]:
    left_out = [f"{kind.count} rows left out: {kind.problem}" for kind in problems.kinds.values()]
    return [*left_out, *notes.lines()]


def _parts(of: Of, encoder: Encoder, found: Sequence[Path], context: Context) -> Iterator[Encoded]:
    """What becomes of each batch of rows, in their order; in several processes where that is worth it."""
    places = {file: at for at, file in enumerate(found)}
    batches = selected(encoder.source, found, context.seed)
    workers = machine.cores() if sum(file.stat().st_size for file in found) > PARALLEL_BYTES else 1
    if workers == 1:
        yield from (_part(of, encoder, places, rows) for rows in batches)
        return
    spawned = multiprocessing.get_context("spawn")  # this process has threads, which no fork survives
    with ProcessPoolExecutor(workers, spawned, initializer=_begin, initargs=(of, encoder, places)) as pool:
        yield from _in_order(pool.submit, batches, workers * AHEAD)


def _in_order(submit: Callable[..., Future[Encoded]], batches: Iterable[list[Row]], most: int) -> Iterator[Encoded]:
    """Results in the order of what was submitted, of which at most so many are under way."""
    under_way: deque[Future[Encoded]] = deque()
    try:
        for rows in batches:
            under_way.append(submit(_in_worker, rows))
            if len(under_way) >= most:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


_told: list[Any] = []
"""In a worker: what it is to do with each batch."""


def _begin(*told: Any) -> None:
    machine.die_with_parent()  # a worker of a killed process would wait for its next batch for ever
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has a core
    _told[:] = told


def _in_worker(rows: list[Row]) -> Encoded:
    of, encoder, places = _told
    return _part(of, encoder, places, rows)


def _part(of: Of, encoder: Encoder, places: dict[Path, int], rows: list[Row]) -> Encoded:
    problems, notes = Problems(), Notes()
    found: Sequence[Conversation | TokenPair | TokenAnswer | Prompt]
    if of == "chats":
        found = encoder.conversations(rows, problems, notes)
    elif of == "pairs":
        found = pairs.encode(rows, encoder, problems, notes)
    elif of == "prompts":
        found = prompts.encode(rows, encoder, problems, notes)
    else:
        found = answers.encode(rows, encoder, problems, notes, of)
    return Encoded(columns.record_batch(of, found, places), len(rows), problems.counted(), notes)
