"""Preference pairs in tokens: the prompt, which ends where the assistant begins, and either answer after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cordee.chat import formats, schema, texts
from cordee.chat.conversations import Encoder
from cordee.chat.problems import BadRowError, Notes, Problems
from cordee.chat.schema import Record
from cordee.chat.source import Rules
from cordee.chat.spans import require_thoughts
from cordee.chat.spelling import Message
from cordee.chat.templates import OTHERWISE, Template, common_length
from cordee.chat.values import number
from cordee.data.row import Row


@dataclass(frozen=True)
class TokenPair:
    """A preference pair in token ids."""

    file: Path
    number: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_reference_logprob: float | None = None
    """Its sum over the answer's tokens under the reference model, nats, where the row tells it."""
    rejected_reference_logprob: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens that one pass over the pair reads: the prompt stands before either side."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


NUMBERS = ("chosen_reference_logprob", "rejected_reference_logprob")
"""Columns of a pair beside its texts."""
TOKENS = ("chosen_reference_tokens", "rejected_reference_tokens")
"""Of how many tokens those log-probabilities are."""
BESIDE = (*TOKENS, "chosen_reward", "rejected_reward", "reference_rewards")
"""What else a pair may say of its sides, which other methods read."""


def encode(rows: Sequence[Row], encoder: Encoder, problems: Problems, notes: Notes) -> list[TokenPair]:
    """Preference pairs in tokens."""
    found: list[TokenPair] = []
    for row in rows:
        with problems.of(row.file, row.number, row.values):
            found.append(of_row(row, formats.columns_of(row, encoder.source), encoder, notes))
    return found


def of_row(row: Row, values: dict[str, Any], encoder: Encoder, notes: Notes) -> TokenPair:
    """A row, whose columns are `values`, as a pair in tokens.

    Raises:
        BadRowError: it is none, or can't be used.
    """
    used = {*schema.PAIR, *NUMBERS, *BESIDE}
    shaped = formats.pair(values, as_text=encoder.as_text)
    if isinstance(shaped, formats.TextPair):
        notes.other_columns.update(values.keys() - used)
        prompt, chosen, rejected = texts.pair(shaped, encoder.tokenizer)
        notes.texts += 1
        for answer in (shaped.chosen, shaped.rejected):
            notes.look_at(answer)
    else:
        template = encoder.required_template()
        pair = schema.pair(Record(row.file, row.number, shaped), template, encoder.source.ignore)
        notes.other_columns.update(schema.other_columns(shaped, used, encoder.source.ignore))
        answers = {"chosen": pair.chosen, "rejected": pair.rejected}
        prompt, (chosen, rejected) = rendered(pair.prompt, answers, pair.options, template, notes)
    sides = zip(NUMBERS, TOKENS, (chosen, rejected), strict=True)
    told = [_told(values, logprob, tokens, len(side)) for logprob, tokens, side in sides]
    return _fitted(TokenPair(row.file, row.number, prompt, chosen, rejected, *told), encoder.rules, notes)


def _told(values: Mapping[str, Any], logprob: str, tokens: str, length: int) -> float | None:
    """The log-probability that a row tells of an answer; None where it is of other tokens.

    The end of a prompt may be one token with the beginning of either answer: what the answers don't share is counted
    to both, and who scored them one by one divided one of them elsewhere.
    """
    return number(values, logprob) if number(values, tokens) in (None, length) else None


def rendered(
    asked: list[Message],
    answers: Mapping[str, list[Message]],
    options: dict[str, Any],
    template: Template,
    notes: Notes,
) -> tuple[list[int], list[list[int]]]:
    """Render and tokenize answers to a prompt: the prompt is what all of them share with the prompt alone.

    Args:
        asked: the prompt.
        answers: each by the name of its column.
        options: what else the template is given.
        template: renders and encodes.
        notes: told what is not as one might expect.

    Returns:
        The ids of the prompt, and of each answer after it.

    Raises:
        BadRowError: the prompt is rendered differently before an answer, beyond its generation prompt.
    """
    chats = [[*asked, *side] for side in answers.values()]
    texts = template.texts(chats, options)
    prompt = template.text(asked, options, add_generation_prompt=True)
    context = template.context(prompt, asked, options, texts)
    for name, chat, text in zip(answers, chats, texts, strict=True):
        template.require_written(chat, options)
        for message in chat[len(asked) :]:
            require_thoughts(message, text, name)
        if not text.startswith(prompt[:context]):
            raise BadRowError(OTHERWISE)
    alone, *whole = template.encode([prompt, *texts])["input_ids"]
    length = min(common_length(alone, ids) for ids in whole)
    notes.begins_differently += length < len(alone)
    for (name, side), ids in zip(answers.items(), whole, strict=True):
        said = [token for token in ids[length:] if token not in template.special_ids]
        if not template.tokenizer.decode(said, clean_up_tokenization_spaces=False).strip():
            raise BadRowError("an answer is rendered as nothing", name)
        notes.without_end += not template.special_ids.intersection(ids[length:])
        if len(side) == 1 and side[0].keys() <= {"role", "content"}:
            notes.look_at(side[0].get("content"))
    return whole[0][:length], [ids[length:] for ids in whole]


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
        whole = pair
        pair = replace(pair, chosen=pair.chosen[:left], rejected=pair.rejected[:left])
        # said of the whole answers
        pair = replace(pair, chosen_reference_logprob=None, rejected_reference_logprob=None)
        if pair.chosen == pair.rejected and whole.chosen != whole.rejected:
            raise rules.limits.overlong(tokens, "the answers differ only behind it")
        notes.cut += 1
    if pair.chosen == pair.rejected:
        raise BadRowError("chosen and rejected are the same tokens: there is nothing to prefer")
    return pair
