"""Preference pairs in tokens: the prompt, which ends where the assistant begins, and either answer after it."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cordee.chat import schema
from cordee.chat.formats import BadRowError, Limits, Note, Notes, Problems, read
from cordee.chat.schema import Pair
from cordee.chat.templates import OTHERWISE, Template, common_length


@dataclass(frozen=True)
class TokenPair:
    """A preference pair in token ids."""

    file: Path
    number: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """Tokens that one pass over the pair reads: the prompt stands before either side."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def tokenize(
    file: Path, template: Template, limits: Limits, note: Note, ignore: Collection[str] = ()
) -> list[TokenPair]:
    """A file's preference pairs in tokens; arguments and errors as for `conversations.tokenize`."""
    records, problems, notes = read(file), Problems(file), Notes()
    found: list[TokenPair] = []
    for record in records:
        with problems.of(record.number):
            found.append(_pair(schema.pair(record, template, ignore), template, limits, notes))
    problems.raise_any(len(records))
    notes.other_columns = schema.other_columns(records, schema.PAIR, ignore)
    notes.tell(file, note)
    return found


def _pair(pair: Pair, template: Template, limits: Limits, notes: Notes) -> TokenPair:
    """Render and tokenize a pair: the prompt is what both sides share with the prompt alone.

    Raises:
        BadRowError: the prompt is rendered otherwise before a side, beyond its generation prompt, or a limit is met.
    """
    chats = [[*pair.prompt, *side] for side in (pair.chosen, pair.rejected)]
    texts = [template.text(chat, pair.options) for chat in chats]
    prompt, context = template.prompt(pair.prompt, pair.options, texts)
    for chat, text in zip(chats, texts, strict=True):
        template.require_written(chat, pair.options)
        if not text.startswith(prompt[:context]):
            raise BadRowError(OTHERWISE)
    asked, chosen, rejected = template.encode([prompt, *texts])["input_ids"]
    length = min(common_length(asked, chosen), common_length(asked, rejected))
    notes.otherwise += length < len(asked)
    for ids in (chosen, rejected):
        limits.check(ids)
        notes.without_end += not template.special_ids.intersection(ids[length:])
    if chosen == rejected:
        raise BadRowError("chosen and rejected are the same tokens: there is nothing to prefer")
    return TokenPair(pair.file, pair.number, chosen[:length], chosen[length:], rejected[length:])
