"""Prompts: read as a stream, chosen and checked before any is asked, and encoded for each model."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from cordee import model_folder
from cordee.chat import schema
from cordee.chat.formats import columns_of, question
from cordee.chat.problems import BadRowError, Note, Problems
from cordee.chat.schema import OPTIONS, Record
from cordee.chat.selection import files_of
from cordee.chat.source import Source
from cordee.chat.spelling import Message, joined
from cordee.chat.templates import Template
from cordee.chat.values import says, without_nulls
from cordee.compute.tokenizer import open_tokenizer
from cordee.data.row import Row
from cordee.data.rows import ROWS_AT_ONCE, batches
from cordee.errors import UserError
from cordee.stage import Context

Kept = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Prompt:
    """A row that is asked."""

    number: int
    """Its place among all rows of the source, from 0."""
    record: Record
    """The row, with the `messages` that are asked."""
    answer: Any
    """What stands beside them as the right answer; None where nothing does."""

    @property
    def messages(self) -> list[Message]:
        """The messages as the row has them, without nulls."""
        found: list[Message] = without_nulls(self.record.values["messages"])
        return found

    @property
    def shown(self) -> str:
        """The text of the last message, for people."""
        content = self.messages[-1].get("content")
        return joined(content) if content else ""

    @property
    def reference(self) -> str | None:
        """The answer that stands beside it, for people; None where it is no text."""
        content = joined(self.answer) if is_parts(self.answer) else self.answer
        return str(content) if isinstance(content, str | int | float) else None


@dataclass(frozen=True)
class Prompts:
    """The rows of a source that are asked; memory holds a byte for each row of the source."""

    source: Source
    kept: Kept
    """`[rows]`: whether a row of the source is asked."""

    def __len__(self) -> int:
        return int(self.kept.sum())

    def share(self, which: int, of: int) -> "Prompts":
        """Every `of`-th prompt, from the one at place `which` on, counted from 1.

        Raises:
            UserError: there are fewer prompts than parts.
        """
        if of > len(self):
            raise UserError(f"{len(self)} prompts can't be divided into {of} parts", key="partition")
        kept = np.zeros_like(self.kept)
        kept[self.kept.nonzero()[0][which - 1 :: of]] = True
        return Prompts(self.source, kept)

    def __iter__(self) -> Iterator[Prompt]:
        """The prompts, in the order of the source; they are known to be such."""
        problems = Problems()
        yield from _read(self.source, self.kept, problems)
        problems.raise_any(self.source.path, len(self.kept))


@dataclass(frozen=True)
class Encoder:
    """How a model is asked: in its own chat template and tokens."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    """None where it has none: a base model continues the text."""
    longest: int
    """Tokens of the longest prompt."""
    ignore: Collection[str] = ()
    """Columns and keys of messages that are left out."""

    @classmethod
    def of(cls, name: str, folder: Path, longest: int, ignore: Collection[str], note: Note) -> "Encoder":
        """The encoder of the model or adapter in a folder."""
        tokenizer = open_tokenizer(model_folder.tokenizer_of(folder), key="models")
        if tokenizer.chat_template:
            return cls(name, tokenizer, Template(tokenizer), longest, ignore)
        note(f"{name} has no chat template: it continues each prompt as it stands")
        return cls(name, tokenizer, None, longest, ignore)

    def encode(self, prompts: Sequence[Prompt], problems: Problems) -> list[list[int]]:
        """The token ids `[seq]` of each prompt, up to where the answer begins; of one with a problem, none."""
        texts, asked = [], []
        for prompt in prompts:
            record = prompt.record
            with problems.of(record.file, record.number, record.values):
                texts.append(self._text(prompt))
                asked.append(record)
        if not texts:
            return []
        encoded = self.template.encode(texts) if self.template else self.tokenizer(texts)
        found = []
        for record, ids in zip(asked, encoded["input_ids"], strict=True):
            with problems.of(record.file, record.number, record.values):
                if len(ids) > self.longest:
                    problem = f"models.{self.name}: longer than {self.longest} tokens: max_length less max_tokens"
                    raise BadRowError(problem, f"{len(ids)} tokens", "raise max_length, or lower max_tokens")
                found.append(ids)
        return found

    def _text(self, prompt: Prompt) -> str:
        """A prompt as the model reads it.

        Raises:
            BadRowError: the template refuses or does not write it, or there is none and the prompt needs one.
        """
        try:
            if self.template is None:
                return plain(prompt)
            chat = schema.asked(prompt.record, self.template, self.ignore)
            return self.template.text(chat.messages, chat.options, add_generation_prompt=True)
        except BadRowError as error:
            raise BadRowError(f"models.{self.name}: {error.problem}", error.shown_by, error.hint) from error


def plain(prompt: Prompt) -> str:
    """A prompt as a text that a model without a chat template continues: its contents, with a blank line between them.

    Raises:
        BadRowError: it holds what only a template could write.
    """
    if named := [name for name in OPTIONS if says(prompt.record.values.get(name))]:
        raise BadRowError(f"has {named[0]}, and the model has no chat template", hint=f"`ignore: [{named[0]}]`")
    contents = []
    for message in prompt.messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) and not is_parts(content):
            raise BadRowError("a message is no text, and the model has no chat template")
        contents.append(joined(content))
    if not contents:
        raise BadRowError("asks nothing")
    return "\n\n".join(contents)


def is_parts(content: Any) -> bool:
    """Whether a content is a list of parts that are texts."""
    return isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    )


def choose(source: Source, most: int | None, note: Note) -> Prompts:
    """All rows of a source, or `most` of them, spread evenly over the languages.

    Raises:
        UserError: it holds none.
    """
    languages = [_language(row, source) for row in _rows(source)]
    if not languages:
        raise UserError("holds no prompt", file=source.path, key="prompts")
    kept = np.ones(len(languages), dtype=bool)
    if most is not None and most < len(languages):
        kept[:] = False
        kept[spread(languages, most)] = True
        note(f"{most} of {len(languages)} prompts are answered (`max_prompts`)")
    return Prompts(source, kept)


def spread(languages: Sequence[str], count: int) -> list[int]:
    """The places of `count` rows spread evenly over the languages, in their order; of all rows if there are fewer.

    Round by round, each language gives one row more; a round that is not needed in full is thinned evenly. The
    languages begin at different rows, so that not all give the same passage.
    """
    by_language: dict[str, list[int]] = {}
    for at, language in enumerate(languages):
        by_language.setdefault(language, []).append(at)
    turned = [[own[(turn + at) % len(own)] for at in range(len(own))] for turn, own in enumerate(by_language.values())]
    chosen: list[int] = []
    for turn in range(max(map(len, turned))):
        coming = [own[turn] for own in turned if turn < len(own)]
        needed = min(count - len(chosen), len(coming))
        chosen += [coming[at * len(coming) // needed] for at in range(needed)]
        if len(chosen) == count:
            break
    return sorted(chosen)


def checked(
    prompts: Prompts, encoders: Sequence[Encoder], context: Context, *, may_drop: bool
) -> tuple[Prompts, Problems]:
    """The prompts that all models can be asked, and what is wrong with the others.

    Raises:
        UserError: there are others, and they may not be left out; or no prompt is left.
        Stopped: a stop was asked for.
    """
    source, problems, kept = prompts.source, Problems(), np.zeros_like(prompts.kept)
    coming = _read(source, prompts.kept, problems)
    while batch := list(itertools.islice(coming, ROWS_AT_ONCE)):
        if context.stop_requested():
            context.stop(f"row {batch[0].number} of {len(kept)} of the prompts")
        for encoder in encoders:
            encoder.encode(batch, problems)
        good = [one.number for one in batch if not problems.has(one.record.file, one.record.number)]
        kept[good] = True
    settled = "`bad_rows: drop` leaves such rows out and counts them"
    problems.raise_any(source.path, len(prompts), lambda _: may_drop, settled)
    if not kept.any():
        kinds = "; ".join(f"{kind.count} {kind.problem}" for kind in problems.kinds.values())
        raise UserError(f"no prompt of {len(prompts)} is left: {kinds}", file=source.path, key="prompts")
    return Prompts(source, kept), problems


def thinned(prompts: Prompts, count: int) -> Prompts:
    """`count` of the prompts at equal distances; all of them if there are fewer."""
    places = prompts.kept.nonzero()[0]
    count = min(count, len(places))
    kept = np.zeros_like(prompts.kept)
    kept[places[np.arange(count) * len(places) // count]] = True
    return Prompts(prompts.source, kept)


def _read(source: Source, kept: Kept, problems: Problems) -> Iterator[Prompt]:
    """The kept rows of a source as prompts; one that is none is noted."""
    for number, row in enumerate(_rows(source)):
        if not kept[number]:
            continue
        found = None
        with problems.of(row.file, row.number, row.values):
            values, answer = question(columns_of(row, source))
            found = Prompt(number, Record(row.file, row.number, values), answer)
        if found:
            yield found


def _rows(source: Source) -> Iterator[Row]:
    return itertools.chain.from_iterable(batches(files_of(source, "prompts").documents, key="prompts"))


def _language(row: Row, source: Source) -> str:
    """What a row says of its language; rows that can't be read are found later."""
    try:
        return str(columns_of(row, source).get("language") or "")
    except BadRowError:
        return ""
