"""Scores answers reward by reward and part by part: one model is in memory at a time, and a kill costs a part."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee import files, model_folder, parts, units
from cordee.chat.source import Source
from cordee.errors import UserError
from cordee.stage import Context
from posttrain.rewards import reference as of_reference
from posttrain.rewards.answers import Answer, Answers
from posttrain.rewards.by_model import SUM, ByModel
from posttrain.rewards.judge import HIGH_DISAGREEMENT, LOW_MASS
from posttrain.rewards.opening import VALUE, open_reward, total
from posttrain.rewards.reference import LOGPROB, SAMPLED, SAMPLED_TOKENS, TOKENS, Encoder
from posttrain.rewards.settings import KINDS, Reward
from posttrain.rewards.summary import Summary
from posttrain.rewards.texts import text_of

PARTS, SCORED = "parts", "scored.jsonl"
REFERENCE, POLICY = "reference", "policy-"
"""The name of the pass that computes log-probabilities, and the beginning of those of the models that answered; no
reward has a folder of such a name."""
Measure = Callable[[Sequence[Answer]], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Reader:
    """A model that gives answers their log-probabilities, and how it reads them."""

    folder: Path
    encoder: Encoder
    precision: str

    @classmethod
    def of(cls, folder: Path, key: str, max_length: int | None, sources: Sequence[Source], precision: str) -> "Reader":
        """The reader in a folder of a model or an adapter."""
        model_folder.require_served(folder, key)
        return cls(folder, Encoder.of(folder, max_length, sources, key), precision)


@dataclass(frozen=True)
class Pass:
    """One way over all answers."""

    name: str
    folder: str
    open: Callable[[], AbstractContextManager[Measure]]


def score(
    answers: Answers, rewards: Sequence[Reward], context: Context, *, batch_size: int, shown: int,
    reference: Reader | None, policies: Mapping[str, Reader], reference_answers: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Score all answers, write `scored.jsonl`, `scores.json` and `samples.jsonl`, and say what they are like.

    Args:
        answers: by their prompts.
        rewards: what they are scored by.
        context: where to write.
        batch_size: prompts of a part.
        shown: prompts whose best and worst answer are kept.
        reference: gives log-probabilities.
        policies: give those of their own answers, by the `model` of the rows.
        reference_answers: the `model` of the rows whose rewards are those of the reference; None: all rows, if they
            are of one model.

    Raises:
        UserError: a reward can't be had, or not for these answers.
        Stopped: a stop was asked for.
    """
    models = answers.models()
    for name in sorted(policies.keys() - models):
        raise UserError(f"no answer has the `model` {name!r}", key=f"policies.{name}", hint="the rows say who answered")
    passes = _passes(rewards, reference, policies, context)
    for done, one in enumerate(passes):
        _run(one, answers, batch_size, context, done * len(answers), len(passes) * len(answers))
    summary = Summary()
    is_known = reference_answers is not None or len(models) == 1  # whose rewards are the reference's
    if rewards and not is_known:
        told = f"the rows are of {len(models)} models ({', '.join(sorted(models))})"
        context.note(f"{told}: no `reference_rewards`, since `reference_answers` does not say which is the reference")
    kept = _write(answers, passes, rewards, context, summary, shown, reference_answers, writes_references=is_known)
    for reward in rewards:
        mass = summary.further(reward.label, "mass")
        if mass is not None and mass < LOW_MASS:
            share = units.score(mass, percent=True)
            context.note(f"{reward.label}: the judge says one of the words it is asked for with {share} only")
        differing = summary.further(reward.label, "disagreement")
        if differing is not None and differing > HIGH_DISAGREEMENT:
            share = units.score(differing, percent=True)
            context.note(f"{reward.label}: the judge prefers a place, not an answer, in {share} of the comparisons")
    shutil.rmtree(context.out / PARTS)
    return {"rows": answers.rows, "prompts": len(answers), **kept}


def _passes(
    rewards: Sequence[Reward], reference: Reader | None, policies: Mapping[str, Reader], context: Context
) -> list[Pass]:
    """Functions first; judges last, since vLLM replaces operations that transformers would run."""
    functions, models, judges = (
        [_pass(reward, context) for reward in rewards if getattr(reward, kind) is not None] for kind in KINDS
    )
    if reference is not None:
        functions.append(_reading(REFERENCE, reference, None))
    functions += [_reading(f"{POLICY}{name}", reader, name) for name, reader in policies.items()]
    return [*functions, *models, *judges]


def _reading(name: str, reader: Reader, only: str | None) -> Pass:
    def opened() -> AbstractContextManager[Measure]:
        return of_reference.opened(reader.folder, reader.encoder, reader.precision, only)

    return Pass(name, name, opened)


def _pass(reward: Reward, context: Context) -> Pass:
    @contextmanager
    def opened() -> Iterator[Measure]:
        one = open_reward(reward, context.note)
        try:
            yield one.of
        finally:
            one.close()

    return Pass(reward.label, f"reward-{reward.label}", opened)


def _run(one: Pass, answers: Answers, size: int, context: Context, before: int, total_prompts: int) -> None:
    """Go over all answers once, as far as that is not done."""
    folder = context.out / PARTS / one.folder
    folder.mkdir(parents=True, exist_ok=True)
    coming = list(parts.ends(folder, len(answers), size))
    if all(is_there for _, is_there in coming):
        return
    is_reward = one.name != REFERENCE and not one.name.startswith(POLICY)
    context.waits(f"the reward {one.name}" if is_reward else f"the model {one.name.removeprefix(POLICY)}")
    with one.open() as measure:
        at = 0
        for end, is_there in coming:
            if not is_there:
                context.progress(before + at, total_prompts, "prompts")
                if context.stop_requested():
                    context.stop(f"{one.name}: prompt {at} of {len(answers)}")
                rows = [answer for group in answers.groups(at, end) for answer in group]
                parts.write(folder, at, end, measure(rows))
            at = end


def _write(
    answers: Answers, passes: Sequence[Pass], rewards: Sequence[Reward], context: Context, summary: Summary,
    shown: int, reference_answers: str | None, *, writes_references: bool,
) -> dict[str, Any]:  # fmt: skip
    """Write all rows with what was measured of them."""
    columns = {one.name: parts.read(context.out / PARTS / one.folder) for one in passes}
    weights = {reward.label: reward.weight for reward in rewards}
    every = max(1, len(answers) // shown)
    samples: list[dict[str, Any]] = []
    by_model = ByModel(reference_answers)
    counts = {"tokens": 0, "without_reward": 0, "empty": 0, "without_reference_answers": 0, "other_tokens": 0}
    beside = context.out / f".{SCORED}.tmp"
    with beside.open("w", encoding="utf-8", errors="surrogatepass") as out:
        for place, group in enumerate(answers.groups()):
            found = [{name: next(column) for name, column in columns.items()} for _ in group]
            rows = [_row(answer, figures, weights, summary) for answer, figures in zip(group, found, strict=True)]
            if rewards and writes_references:
                own = [row[VALUE] for row in rows if reference_answers in (None, row.get("model"))]
                known = sorted(value for value in own if value is not None)
                counts["without_reference_answers"] += not known
                for row in rows:
                    row["reference_rewards"] = known
            out.writelines(map(parts.line, rows))
            by_model.add(place, rows)
            counts["tokens"] += sum(row.get("reference_tokens") or 0 for row in rows)
            counts["without_reward"] += sum(row.get(VALUE) is None for row in rows)
            counts["other_tokens"] += sum(row.get("as_sampled") is False for row in rows)
            counts["empty"] += sum(answer.is_empty for answer in group)
            if rewards and place % every == 0 and len(samples) < shown:
                samples += _sample(group, rows)
    beside.replace(context.out / SCORED)
    files.write_text(context.out / "samples.jsonl", "".join(map(parts.line, samples)))
    told: dict[str, Any] = {
        "rewards": summary.described(),
        "by": summary.by(),
        "models": by_model.described(),
        "compared_with": reference_answers,
        "weights": weights,
        "left_out": answers.left_out,
    }
    files.write_json(context.out / "scores.json", {**told, **counts, "answers": answers.rows, "prompts": len(answers)})
    _note(counts, reference_answers, context, has_reference=REFERENCE in columns)
    means = {f"{name}_mean": one["mean"] for name, one in told["rewards"].items() if "mean" in one}
    return {**counts, **means}


def _row(
    answer: Answer, figures: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float], summary: Summary
) -> dict[str, Any]:
    """A row with its rewards and its log-probability, which take the place of those that it may have had."""
    row = dict(answer.values)
    if weights:
        row.pop("reference_rewards", None)  # of other rewards
        row["rewards"] = {name: figures[name][VALUE] for name in weights}
        row[VALUE] = total(row["rewards"], weights)
        for name, value in (*row["rewards"].items(), (SUM, row[VALUE])):
            summary.add(name, value, row)
        for name in weights:
            summary.add_further(name, figures[name])
    if REFERENCE in figures:
        row["reference_logprob"] = figures[REFERENCE][LOGPROB]
        row["reference_tokens"] = figures[REFERENCE][TOKENS]
        row["as_sampled"] = _is_as_sampled(row, figures[REFERENCE][SAMPLED_TOKENS])
    if own := figures.get(f"{POLICY}{row.get('model')}"):
        row["policy_logprob"] = own[LOGPROB]
        is_known = row["as_sampled"] and own[SAMPLED] is not None
        row["log_ratio"] = own[SAMPLED] - figures[REFERENCE][SAMPLED] if is_known else None
    return row


def _is_as_sampled(row: Mapping[str, Any], scored: int | None) -> bool | None:
    """Whether an answer ended by itself and its text has as many tokens as were sampled; true if a row doesn't say."""
    return None if scored is None else row.get("finish_reason") != "length" and row.get("tokens") in (None, scored)


def _sample(group: Sequence[Answer], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The best and the worst answer to a prompt, for the report; none where fewer than two have a reward."""
    order = sorted((row[VALUE], at) for at, row in enumerate(rows) if row[VALUE] is not None)
    if len(order) < 2:
        return []
    (low, worst), (high, best) = order[0], order[-1]
    row = rows[best]
    right = row.get("answer")
    return [
        {
            "prompt": text_of(group[best].prompt),
            "reference": str(right) if isinstance(right, str | int | float) else None,
            "kind": str(row.get("kind") or ""), "language": str(row.get("language") or ""),
            "outputs": {"best": group[best].text, "worst": group[worst].text},
            "rewards": {"best": high, "worst": low},
        }
    ]  # fmt: skip


def _note(counts: Mapping[str, int], reference_answers: str | None, context: Context, *, has_reference: bool) -> None:
    left = ": they have no reference log-probability" if has_reference else ""
    said = {
        "answers to which no reward applies": counts["without_reward"],
        f"answers say nothing{left}": counts["empty"],
        "answers were cut off, or their text has other tokens than were sampled: the log-probability is not that of "
        "what the model sampled": counts["other_tokens"],
        f"prompts have no answer with a reward by {reference_answers!r}": counts["without_reference_answers"],
    }
    for text, count in said.items():
        if count:
            context.note(f"{count} {text}")
