"""Single answers in tokens, with what is said of them: whether they are good, or their reward."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cordee.chat import completions, formats, pairs, schema
from cordee.chat.conversations import Encoder
from cordee.chat.problems import BadRowError, Notes, Problems
from cordee.chat.schema import Record
from cordee.chat.source import Rules
from cordee.chat.values import number, numbers, truth
from cordee.data.row import Row

Needs = Literal["labelled", "scored"]
TOLD = ("label", "reward", "rewards", "reference_logprob", "reference_tokens", "reference_rewards")
"""Columns beside the texts."""


@dataclass(frozen=True)
class TokenAnswer:
    """A prompt and an answer in token ids."""

    file: Path
    number: int
    prompt: list[int]
    completion: list[int]
    label: float | None
    """1: good, 0: bad; None where it is not told."""
    reward: float | None
    """None where it is not told."""
    reference_logprob: float | None
    """Its sum over the answer's tokens under the reference model, nats; None where it is not told."""
    reference_rewards: tuple[float, ...]
    """The rewards of the reference model's own answers to the prompt; empty where they are not told."""

    @property
    def tokens(self) -> int:
        """Tokens that one pass over it reads."""
        return len(self.prompt) + len(self.completion)


def encode(rows: Sequence[Row], encoder: Encoder, problems: Problems, notes: Notes, needs: Needs) -> list[TokenAnswer]:
    """Answers in tokens; of a preference pair either side is one.

    Args:
        rows: what was read.
        encoder: renders and encodes.
        problems: told of rows that can't be used.
        notes: told what is not as one might expect.
        needs: `labelled`: each has to say whether it is good; `scored`: it has to have a reward, and those of the
            reference model's own answers.
    """
    found: list[TokenAnswer] = []
    for row in rows:
        with problems.of(row.file, row.number, row.values):
            values = formats.columns_of(row, encoder.source)
            if all(column in values for column in formats.PAIRS):
                answers = _sides(row, values, encoder, notes)
            else:
                answers = [_answer(row, values, encoder, notes)]
            for one in answers:
                _require(one, needs)
            found += answers
    return found


def _sides(row: Row, values: dict[str, Any], encoder: Encoder, notes: Notes) -> list[TokenAnswer]:
    """Both answers of a preference pair."""
    pair = pairs.of_row(row, values, encoder, notes)
    rewards = numbers(values, "reference_rewards")
    found = []
    for side, ids, logprob in (
        ("chosen", pair.chosen, pair.chosen_reference_logprob),
        ("rejected", pair.rejected, pair.rejected_reference_logprob),
    ):
        reward = number(values, f"{side}_reward")
        label = float(side == "chosen")
        found.append(TokenAnswer(row.file, row.number, pair.prompt, ids, label, reward, logprob, rewards))
    return found


def _answer(row: Row, values: dict[str, Any], encoder: Encoder, notes: Notes) -> TokenAnswer:
    shaped = formats.answer(values, as_text=encoder.as_text)
    used = {*schema.ANSWER, *TOLD}
    if isinstance(shaped, formats.Text):
        notes.other_columns.update(values.keys() - used)
        prompt, completion = completions.of_text(shaped.prompt, shaped.completion, encoder.tokenizer)
        notes.texts += 1
        notes.look_at(shaped.completion)
    else:
        template = encoder.required_template()
        one = schema.answered(Record(row.file, row.number, shaped), template, encoder.source.ignore)
        notes.other_columns.update(schema.other_columns(shaped, used, encoder.source.ignore))
        sides = {"completion": one.completion}
        prompt, (completion,) = pairs.rendered(one.prompt, sides, one.options, template, notes)
    label, reward = truth(values, "label"), number(values, "reward")
    told = number(values, "reference_logprob"), numbers(values, "reference_rewards")
    return _fitted(TokenAnswer(row.file, row.number, prompt, completion, label, reward, *told), encoder.rules, notes)


def _require(one: TokenAnswer, needs: Needs) -> None:
    """See that an answer has what a method learns from.

    Raises:
        BadRowError: it has not.
    """
    if needs == "labelled" and one.label is None:
        raise BadRowError("does not say whether the answer is good", hint="`label: true` or `false`, or a pair")
    if needs == "scored" and one.reward is None:
        hint = "`reward`, or of a pair `chosen_reward` and `rejected_reward`; posttrain.score writes them"
        raise BadRowError("has no reward", hint=hint)
    if needs == "scored" and not one.reference_rewards:
        hint = "posttrain.score writes `reference_rewards`: numbers; of several models with `reference_answers`"
        raise BadRowError("has no rewards of the reference model's own answers", hint=hint)


def _fitted(one: TokenAnswer, rules: Rules, notes: Notes) -> TokenAnswer:
    """An answer within the limits, cut where the rules say so.

    Raises:
        OverlongRowError: it is too long, or nothing is left of it.
        BadRowError: it holds an id beyond the model's embedding.
    """
    rules.limits.check_ids([*one.prompt, *one.completion])
    longest = rules.limits.longest
    if longest is None or one.tokens <= longest:
        return one
    if rules.overlong != "cut":
        raise rules.limits.overlong(one.tokens)
    left = longest - len(one.prompt)
    if left <= 0:
        raise rules.limits.overlong(one.tokens, "no answer is left of it")
    notes.cut += 1
    return replace(one, completion=one.completion[:left], reference_logprob=None)  # said of the whole answer
