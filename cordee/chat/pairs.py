"""Preference pairs in tokens: the prompt, which ends where the assistant begins, and either answer after it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cordee.chat import formats, schema, texts
from cordee.chat.conversations import Encoder
from cordee.chat.problems import BadRowError, Notes, Problems
from cordee.chat.schema import Pair, Record
from cordee.chat.source import Rules
from cordee.chat.spans import require_thoughts
from cordee.chat.templates import OTHERWISE, Template, common_length
from cordee.data.row import Row


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


def encode(rows: Sequence[Row], encoder: Encoder, problems: Problems, notes: Notes) -> list[TokenPair]:
    """Preference pairs in tokens."""
    found: list[TokenPair] = []
    for row in rows:
        with problems.of(row.file, row.number, row.values):
            values = formats.columns_of(row, encoder.source)
            shaped = formats.pair(values, as_text=encoder.as_text)
            if isinstance(shaped, formats.TextPair):
                notes.other_columns.update(values.keys() - {*schema.PAIR})
                sides = texts.pair(shaped, encoder.tokenizer)
                notes.texts += 1
            else:
                template = encoder.required_template()
                pair = schema.pair(Record(row.file, row.number, shaped), template, encoder.source.ignore)
                notes.other_columns.update(schema.other_columns(shaped, schema.PAIR, encoder.source.ignore))
                sides = _rendered(pair, template, notes)
            found.append(_fitted(TokenPair(row.file, row.number, *sides), encoder.rules, notes))
    return found


def _rendered(pair: Pair, template: Template, notes: Notes) -> tuple[list[int], list[int], list[int]]:
    """Render and tokenize a pair: the prompt is what both sides share with the prompt alone.

    Raises:
        BadRowError: the prompt is rendered differently before a side, beyond its generation prompt.
    """
    chats = [[*pair.prompt, *side] for side in (pair.chosen, pair.rejected)]
    texts = template.texts(chats, pair.options)
    prompt = template.text(pair.prompt, pair.options, add_generation_prompt=True)
    context = template.context(prompt, pair.prompt, pair.options, texts)
    for name, chat, text in zip(("chosen", "rejected"), chats, texts, strict=True):
        template.require_written(chat, pair.options)
        for message in chat[len(pair.prompt) :]:
            require_thoughts(message, text, name)
        if not text.startswith(prompt[:context]):
            raise BadRowError(OTHERWISE)
    asked, chosen, rejected = template.encode([prompt, *texts])["input_ids"]
    length = min(common_length(asked, chosen), common_length(asked, rejected))
    notes.begins_differently += length < len(asked)
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        said = [number for number in ids[length:] if number not in template.special_ids]
        if not template.tokenizer.decode(said, clean_up_tokenization_spaces=False).strip():
            raise BadRowError("an answer is rendered as nothing", name)
        notes.without_end += not template.special_ids.intersection(ids[length:])
    return chosen[:length], chosen[length:], rejected[length:]


def _fitted(pair: TokenPair, rules: Rules, notes: Notes) -> TokenPair:
    """A pair whose sides are within the limits, cut where the rules say so.

    Raises:
        OverlongRowError: a side is too long, nothing is left of it, or what is left is the same.
        BadRowError: it holds an id beyond the model's embedding, or there is nothing to prefer.
    """
    rules.limits.check_ids([*pair.prompt, *pair.chosen, *pair.rejected])
    longest = rules.limits.longest
    tokens = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
    if longest is not None and tokens > longest:
        if rules.overlong != "cut":
            raise rules.limits.overlong(tokens)
        left = longest - len(pair.prompt)
        if left <= 0:
            raise rules.limits.overlong(tokens, "no answer is left of it")
        whole, pair = pair, replace(pair, chosen=pair.chosen[:left], rejected=pair.rejected[:left])
        if pair.chosen == pair.rejected and whole.chosen != whole.rejected:
            raise rules.limits.overlong(tokens, "the answers differ only behind it")
        notes.cut += 1
    if pair.chosen == pair.rejected:
        raise BadRowError("chosen and rejected are the same tokens: there is nothing to prefer")
    return pair
