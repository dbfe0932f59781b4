"""Makes preference pairs of scored answers: a better and a worse one to the same prompt.

python -m posttrain.pairs --config FILE [key=value …]
"""

import random
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from cordee import files, parts, worker
from cordee.chat.problems import BadRowError
from cordee.chat.source import BadRows, Source
from cordee.chat.values import number
from cordee.config import Config as StageConfig
from cordee.config import FunctionOf
from cordee.cost import Cost
from cordee.errors import UserError, nearest
from cordee.stage import Context
from posttrain.training.cost import source_cost

if TYPE_CHECKING:
    from posttrain.rewards.answers import Answer, Answers

VERSION = 3
PAIRS, WORK = "pairs.jsonl", "rows"
ANSWERS_OWN = (
    *("messages", "prompt", "completion", "conversations", "instruction", "input", "output", "history", "system"),
    *("sample", "model", "finish_reason", "tokens", "special_tokens", "label"),
    *("rewards", "reward", "reference_logprob", "reference_tokens", "policy_logprob", "as_sampled", "log_ratio"),
)
"""Columns that speak of one answer, and are no part of a pair."""
SHOWN = 20
"""Pairs that are kept for the report."""


class Config(StageConfig):
    """Which answers become pairs."""

    data: list[Source] = Field(min_length=1)
    """Scored answers (`$scored/scored.jsonl`), of one or of several partitions."""
    choose: Annotated[str, FunctionOf("posttrain.rewards.choosing")] = "best_worst"
    """Which answers are compared: `best_worst`; `best_worst_quantile`, whose worse one is drawn from the lowest
    `quantile`; `threshold`, above `chosen_above` against below `rejected_below`; `right_wrong`, above 0 against 0."""
    reward: str | None = None
    """The name of the reward that decides; by default the weighted sum of all. Pairs by a reward alone have no
    `reference_rewards`, which are sums."""
    quantile: float = Field(default=0.2, gt=0, lt=1)
    """The share of a prompt's lowest rewards that `best_worst_quantile` draws the worse answer from, from 0 to 1."""
    chosen_above: float | None = None
    """The least reward of a chosen answer, for `threshold`."""
    rejected_below: float | None = None
    """The largest reward of a rejected answer, for `threshold`."""
    max_pairs_per_prompt: int = Field(default=1, ge=1)
    """At most so many pairs of a prompt's answers; no answer is chosen twice, or rejected twice."""
    min_margin: float = Field(default=0.0, ge=0)
    """The least difference of a pair's rewards; answers with equal rewards are never a pair."""
    bad_rows: BadRows = "error"
    """Rows that are no answers: an error that counts them, or dropped and counted."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Check what no key alone can tell."""
        names = ("chosen_above", "rejected_below")
        for name in names:
            if (getattr(self, name) is None) == (self.choose == "threshold"):
                problem = "is needed" if self.choose == "threshold" else f"is for threshold, not for {self.choose}"
                raise UserError(problem, key=name)
        if (self.chosen_above or 0.0) <= (self.rejected_below or 0.0) and self.choose == "threshold":
            raise UserError(f"has to be above rejected_below={self.rejected_below}", key="chosen_above")
        if self.quantile != type(self).model_fields["quantile"].default and self.choose != "best_worst_quantile":
            raise UserError(f"is for best_worst_quantile, not for {self.choose}", key="quantile", hint="leave it out")
        return self


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """No more pairs than answers."""
    known = [
        source_cost(source, f"data.{place}.path", given, "chats", config.bad_rows).rows
        for place, source in enumerate(config.data)
    ]
    rows = [count for count in known if count is not None]
    return Cost(rows=sum(rows) if len(rows) == len(known) else None)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write `pairs.jsonl`, `pairs.json` and `samples.jsonl`; returns the manifest's metrics."""
    from posttrain.rewards import answers

    found = answers.gather(config.data, context.out / WORK, context, config.bad_rows)
    counts: Counter[str] = Counter()
    margins: list[float] = []
    samples: list[dict[str, Any]] = []
    beside = context.out / f".{PAIRS}.tmp"
    with beside.open("w", encoding="utf-8") as out:
        for row in _pairs(config, found, context, counts):
            out.write(parts.line(row))
            margins.append(row["chosen_reward"] - row["rejected_reward"])
            if len(samples) < SHOWN:
                samples.append(_sample(row))
    counts["pairs"] = len(margins)
    named = ("pairs", "prompts", "answers")
    without = {what: count for what, count in counts.items() if count and what not in named}
    told = "; ".join(f"{count} {what}" for what, count in without.items())
    if not margins:
        hint = nearest(config.reward, _names(found)) if config.reward and config.reward not in _names(found) else ""
        problem = f"no pair of {counts['prompts']} prompts: {told}"
        raise UserError(problem, file=config.data[0].path, key="reward" if hint else "data", hint=hint)
    beside.replace(context.out / PAIRS)
    files.write_text(context.out / "samples.jsonl", "".join(map(parts.line, samples)))
    margin = sum(margins) / len(margins)
    summary = {"pairs": len(margins), "prompts": counts["prompts"], "answers": counts["answers"], "without": without,
               "margin_mean": margin, "choose": config.choose}  # fmt: skip
    files.write_json(context.out / "pairs.json", summary)
    shutil.rmtree(context.out / WORK)
    context.note(f"{len(margins)} pairs of {counts['prompts']} prompts" + (f"; {told}" if told else ""))
    return {"rows": len(margins), "prompts": counts["prompts"], "answers": counts["answers"], "margin_mean": margin}


def _pairs(config: Config, found: "Answers", context: Context, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The pairs of all prompts; counts why there is none of a prompt."""
    from posttrain.rewards import choosing

    choose = getattr(choosing, config.choose)
    bounds = choosing.Bounds(config.quantile, config.chosen_above or 0.0, config.rejected_below or 0.0)
    for place, group in enumerate(found.groups()):
        context.stop_if_asked(f"prompt {place} of {len(found)}")
        if place % 1000 == 0:
            context.progress(place, len(found), "prompts")
        counts["prompts"] += 1
        counts["answers"] += len(group)
        known = [(answer, value) for answer in group if (value := _reward(answer, config.reward)) is not None]
        counts["answers without a reward"] += len(group) - len(known)
        said = [(answer, value) for answer, value in known if not answer.is_empty]
        counts["answers that say nothing"] += len(known) - len(said)
        rewards = [value for _, value in said]
        drawn = random.Random(f"{context.seed}:{place}")  # noqa: S311 - data, not secrets
        made = 0
        for chosen, rejected in choose(rewards, bounds, drawn):
            margin, sides = rewards[chosen] - rewards[rejected], (said[chosen][0], said[rejected][0])
            if margin <= 0 or margin < config.min_margin or sides[0].completion == sides[1].completion:
                continue
            row = _row(said[chosen], said[rejected])
            if config.reward is not None:
                row.pop("reference_rewards", None)
            yield row
            made += 1
            if made == config.max_pairs_per_prompt:
                break
        if not made:
            counts[_why(config, rewards)] += 1


def _why(config: Config, rewards: Sequence[float]) -> str:
    """Why no pair was made of answers with these rewards."""
    if len(rewards) < 2:
        return "prompts with fewer than two answers"
    if min(rewards) == max(rewards):
        return "prompts whose answers all have the same reward"
    if config.choose == "right_wrong" and (min(rewards) > 0 or max(rewards) <= 0):
        return "prompts without a wrong answer" if min(rewards) > 0 else "prompts without a right answer"
    if config.choose == "threshold":
        return "prompts without an answer on both sides of the thresholds"
    return f"prompts without two different answers at least min_margin={config.min_margin} apart"


def _reward(answer: "Answer", name: str | None) -> float | None:
    """The reward that decides.

    Raises:
        UserError: the row was not scored by it, or it is no finite number.
    """
    values = answer.values
    if name is None:
        if "rewards" not in values and "reward" not in values:
            raise UserError("has no `reward`", file=answer.file, key=f"row {answer.number}", hint="posttrain.score")
        value = values.get("reward")
    else:
        value = values.get("rewards", {}).get(name)
    try:
        return number({"reward": value}, "reward")
    except BadRowError as error:
        problem = f"{error.problem}: {error.shown_by}"
        raise UserError(problem, file=answer.file, key=f"row {answer.number}", hint="null, if it has none") from error


def _names(found: "Answers") -> set[str]:
    """The names of the rewards that the answers have."""
    return {name for group in found.groups() for answer in group for name in answer.values.get("rewards", {})}


def _row(chosen: "tuple[Answer, float]", rejected: "tuple[Answer, float]") -> dict[str, Any]:
    """A pair as a row."""
    (better, high), (worse, low) = chosen, rejected
    others = {name: value for name, value in better.values.items() if name not in ANSWERS_OWN}
    row = {"prompt": better.prompt, "chosen": better.completion, "rejected": worse.completion,
           "chosen_reward": high, "rejected_reward": low}  # fmt: skip
    for side, answer in (("chosen", better), ("rejected", worse)):
        for name in ("reference_logprob", "reference_tokens"):
            if (value := answer.values.get(name)) is not None:
                row[f"{side}_{name}"] = value
    return row | others


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A pair for the report."""
    from posttrain.rewards.texts import text_of

    return {
        "prompt": text_of(row["prompt"]), "reference": None, "kind": str(row.get("kind") or ""),
        "language": str(row.get("language") or ""),
        "outputs": {"chosen": text_of(row["chosen"]), "rejected": text_of(row["rejected"])},
        "rewards": {"chosen": row["chosen_reward"], "rejected": row["rejected_reward"]},
    }  # fmt: skip


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
