"""What a training would see of data files: shapes, lengths, which tokens carry loss, and what would be left out.

cordee data FILE --model MODEL [key=value …]
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from cordee import model_folder
from cordee.chat import columns, formats, pairs, repeats
from cordee.chat.conversations import Conversation, Encoder
from cordee.chat.pairs import TokenPair
from cordee.chat.problems import BadRowError, Notes, Problems
from cordee.chat.selection import files_of, selected
from cordee.chat.source import Of, Rules, Source
from cordee.compute import tokenizer_changes
from cordee.compute.adapter import table_rows, weights
from cordee.compute.model import open_shapes, sequence_limits
from cordee.compute.tokenizer import open_tokenizer
from cordee.compute.tokenizer_changes import Changes
from cordee.data import rows as data
from cordee.data.row import Row
from cordee.errors import UserError
from cordee.preview_keys import Settings

EXAMPLES = 3
PAIR = "preference pair"
PERCENTS = (50, 90, 99)
LOSS, READ = "bold green", ""
Runs = list[tuple[list[int], bool]]
"""Token ids, with whether they carry loss."""


@dataclass
class Seen:
    """What was found in rows."""

    rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    """Tokens of each sequence; a pair is two, the prompt with either answer."""
    loss_tokens: int = 0
    examples: list[tuple[str, Runs]] = field(default_factory=list)
    """Of the first rows, what is shown, under the row's number; of a pair the prompt and either answer."""
    told: list[dict[str, Any]] = field(default_factory=list)
    """The numbers of all sequences, as they are kept in a training."""
    problems: Problems = field(default_factory=Problems)
    notes: Notes = field(default_factory=Notes)
    as_pairs: bool = False


def run(settings: Settings, model: Path, out: Console) -> None:
    """Look at a file or a folder with a model's tokenizer, and print what a training would see.

    Args:
        settings: what is looked at, and how.
        model: a model, or an adapter on one.
        out: where to print.

    Raises:
        UserError: a key does not fit the model, there is nothing to read, or nothing of it can be trained on.
    """
    encoder, notes = open_encoder(model, settings)
    found = files_of(settings).documents
    rows = (row for batch in selected(settings, found, 0) for row in batch)
    seen = look(islice(rows, settings.rows), encoder, as_pairs=settings.pairs)
    if not seen.rows:
        raise UserError("holds no rows", file=settings.path)
    total, _ = data.estimate(found)
    whole = seen.rows < (settings.rows or seen.rows + 1)
    told = f"{seen.rows:,} row{'s' if seen.rows > 1 else ''}"
    told = told if whole else f"the first {seen.rows:,} of about {total:,.0f} rows"
    out.print(Text(f"{settings.path}: {told}, {len(found)} file{'s' if len(found) > 1 else ''}"), soft_wrap=True)
    _print(out, [*_lines(seen, settings), *(("note", line) for line in notes)])
    for name, runs in seen.examples:
        out.print(Text(f"\n{name}", "dim"))
        out.print(_shown(runs, encoder.tokenizer, colours=out.color_system is not None), soft_wrap=True)
    if not seen.lengths:
        problem = "has no row that can" if whole else "none of the rows that were looked at can"
        raise UserError(f"{problem} be trained on", file=settings.path)


def open_encoder(model: Path, settings: Settings) -> tuple[Encoder, list[str]]:
    """What encodes rows for a model or an adapter, as in a training that starts from it; with notes for people.

    Raises:
        UserError: it is neither, or a key does not fit it.
    """
    adapter = model if model_folder.is_adapter(model) else None
    if adapter is None and settings.base is not None:
        raise UserError(f"is for an adapter, and {model} is a model", key="base", hint="leave it out")
    base = model_folder.base_of(adapter, settings.base, key="model", base_key="base") if adapter else model
    model_folder.require(base, "model")
    own = adapter if adapter and (adapter / "tokenizer.json").is_file() else base
    changes = Changes(tuple(settings.added_tokens), settings.chat_template, settings.pad_token)
    place, notes = tokenizer_changes.changed(own, base, changes)
    tokenizer = open_tokenizer(place, key="model")
    shapes = open_shapes(base)
    limits = sequence_limits(shapes, settings.max_length)
    grown = [int(tokenizer.convert_tokens_to_ids(token)) + 1 for token in settings.added_tokens]
    if adapter:
        notes = [f"{adapter} is an adapter on {base}", *notes]
        grown.append(table_rows(adapter, weights(adapter), shapes))
    limits = replace(limits, vocab_size=max([limits.vocab_size, *grown]))
    rules = Rules(limits, settings.bad_rows, settings.overlong, settings.earlier_answers)
    return Encoder.of(tokenizer, settings, rules), notes


def look(rows: Iterator[Row], encoder: Encoder, *, as_pairs: bool | None) -> Seen:
    """What a training would see of these rows.

    Args:
        rows: of one source.
        encoder: renders and encodes them.
        as_pairs: whether they are preference pairs; None: as most of the first are whose shape is known.
    """
    seen = Seen(as_pairs=bool(as_pairs))
    places: dict[Path, int] = {}
    while batch := list(islice(rows, data.ROWS_AT_ONCE)):
        shapes = Counter(_shape(row, encoder.source) for row in batch)
        if as_pairs is None:
            known = [name for name, _ in shapes.most_common() if name in (PAIR, *formats.CHATS)]
            as_pairs = seen.as_pairs = known[:1] == [PAIR]
        seen.rows += len(batch)
        seen.shapes.update(shapes)
        problems = Problems()
        of: Of = "pairs" if as_pairs else "chats"
        found: Sequence[TokenPair | Conversation]
        if as_pairs:
            found = _look_at_pairs(batch, encoder, problems, seen)
        else:
            found = _look_at_chats(batch, encoder, problems, seen)
        for row in batch:
            places.setdefault(row.file, len(places))
        seen.told.append(columns.numbers([columns.record_batch(of, found, places)]))
        seen.problems.add(problems)
    return seen


def _look_at_pairs(batch: list[Row], encoder: Encoder, problems: Problems, seen: Seen) -> list[TokenPair]:
    found = pairs.encode(batch, encoder, problems, seen.notes)
    for pair in found:
        sides = {"chosen": pair.chosen, "rejected": pair.rejected}
        seen.lengths += [len(pair.prompt) + len(side) for side in sides.values()]
        seen.loss_tokens += sum(map(len, sides.values()))
        if len(seen.examples) < EXAMPLES * (1 + len(sides)):
            seen.examples.append((f"row {pair.number}: prompt", [(pair.prompt, False)]))
            seen.examples += [(f"row {pair.number}: {name}", [(side, True)]) for name, side in sides.items()]
    return found


def _look_at_chats(batch: list[Row], encoder: Encoder, problems: Problems, seen: Seen) -> list[Conversation]:
    found = encoder.conversations(batch, problems, seen.notes)
    for chat in found:
        seen.lengths.append(len(chat.ids))
        seen.loss_tokens += int(chat.has_loss.sum())
        if len(seen.examples) < EXAMPLES:
            edges = [0, *(np.flatnonzero(np.diff(chat.has_loss)) + 1).tolist(), len(chat.ids)]
            runs = [(chat.ids[first:until].tolist(), bool(chat.has_loss[first])) for first, until in pairwise(edges)]
            seen.examples.append((f"row {chat.number}", runs))
    return found


def _shape(row: Row, source: Source) -> str:
    try:
        return formats.shape(formats.columns_of(row, source)) or "unknown"
    except BadRowError:
        return "unknown"


def _lines(seen: Seen, settings: Settings) -> Iterator[tuple[str, str]]:
    """What is said of the rows, each with its name."""
    counted = seen.shapes.most_common()
    shapes = ", ".join(f"{name} {count:,}" if len(counted) > 1 else name for name, count in counted)
    if PAIR in seen.shapes and seen.shapes.keys() & formats.CHATS.keys():
        read_as, other = ("pairs", "false") if seen.as_pairs else ("chats", "true")
        shapes += f"; read as {read_as}, unless pairs={other}"
    yield "shape", shapes
    if seen.lengths:
        middle, high, most = np.percentile(seen.lengths, PERCENTS)
        told = f"median {middle:,.0f}, 90% {high:,.0f}, 99% {most:,.0f}, longest {max(seen.lengths):,} a sequence"
        told += ", of which a pair is two: the prompt with either answer" if seen.as_pairs else ""
        yield "tokens", f"{sum(seen.lengths):,}; {told}; max_length={settings.max_length}"
        yield "loss", f"{seen.loss_tokens / sum(seen.lengths):.1%} of the tokens"
    else:
        yield "tokens", "none: no row is left"
    for kind in seen.problems.kinds.values():
        key, rule = ("overlong", settings.overlong) if kind.is_overlong else ("bad_rows", settings.bad_rows)
        what, drop = ("refused", f"; `{key}: drop` leaves them out") if rule == "error" else ("left out", "")
        first = ", ".join(f"{one.number}: {one.shown_by}" if one.shown_by else str(one.number) for one in kind.shown)
        first += ", …" if kind.count > len(kind.shown) else ""
        s = "s" if kind.count > 1 else ""
        hint = f"; {kind.hint}" if kind.hint and not kind.is_overlong else ""
        yield what, f"{kind.count:,} row{s}: {kind.problem} (row{s} {first}){hint}{drop}"
    for line in (*seen.notes.lines(), *repeats.lines("pairs" if seen.as_pairs else "chats", seen.told)):
        yield "note", line


def _print(out: Console, named: Sequence[tuple[str, str]]) -> None:
    """Print lines that have names: on a terminal within its width, elsewhere each whole."""
    if not out.is_terminal:
        for name, line in named:
            out.print(Text(f"  {name:9}{line}"), soft_wrap=True)
        return
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, line in named:
        table.add_row(f"  {name}", Text(line))
    out.print(table)


def _shown(runs: list[tuple[list[int], bool]], tokenizer: PreTrainedTokenizerBase, *, colours: bool) -> Text:
    """A sequence as text; what carries loss is coloured, or stands between brackets where there are no colours."""
    text = Text()
    for ids, has_loss in runs:
        said = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        text.append(said if colours or not has_loss else f"⟦{said}⟧", LOSS if has_loss else READ)
    return text
