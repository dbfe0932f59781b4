"""Scores answers: rewards by name, their weighted sum, and the log-probability under a reference model.

    python -m posttrain.score --config FILE [key=value …]

Works in parts: an attempt that was interrupted loses no more than the part that it was at.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from cordee import model_folder, worker
from cordee.chat.source import BadRows, Source
from cordee.config import Config as StageConfig
from cordee.config import Execution, Precision, is_written
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.model_folder import ModelInput
from cordee.stage import Context
from posttrain.rewards.settings import RewardList
from posttrain.training.cost import source_cost

VERSION = 3
Place = Annotated[int, Field(ge=1)]


class Config(StageConfig):
    """Which answers are scored, by what."""

    data: list[Source] = Field(min_length=1)
    """Answers (`$samples/answers`): chats that end with one, or prompts with a completion. Those to the same prompt are
    put together, from whichever source they come."""
    rewards: RewardList = Field(default_factory=list)
    """What they are scored by: functions, reward models and judges."""
    reference: ModelInput | None = None
    """The model or adapter whose log-probabilities are written; none if not given."""
    reference_answers: str | None = None
    """The `model` of the rows that are the reference's own answers, whose rewards are written as `reference_rewards` to
    each answer to the same prompt. Without it these are all rows of the prompt, and of rows of several models none: no
    `reference_rewards` are written then."""
    policies: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], ModelInput] = Field(default_factory=dict)
    """Models and adapters by the `model` of the rows that they answered: the log-probability of each one's own answers
    is written too, and its divergence from the reference."""
    precision: Precision = "auto"
    """What the reference's matrices are multiplied in; it has to be that of the training that reads the result."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest prompt with its answer that the reference reads, in tokens; without it, all its positions."""
    bad_rows: BadRows = "error"
    """Rows that are no answers, or that the reference can't read: an error that counts them, or dropped and counted."""
    partition: tuple[Place, Place] = (1, 1)
    """Which part of the prompts is scored, and of how many: `[2, 8]` takes every eighth one, from the second on. Each
    part is a stage of its own; who reads them takes them all."""
    batch_size: Execution[int] = Field(default=64, ge=1)
    """Prompts whose answers are scored and written together: what a kill can cost."""
    shown: int = Field(default=20, ge=1)
    """Prompts whose best and worst answer are kept for the report."""

    def num_gpus(self) -> int:
        """One, for the models that it asks."""
        return 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Check what no key alone can tell."""
        if not self.rewards and self.reference is None:
            hint = "rewards: [{function: exact_match}]"
            raise UserError("missing: give `rewards` or `reference`", key="rewards", hint=hint)
        if self.partition[0] > self.partition[1]:
            raise UserError(f"part {self.partition[0]} of {self.partition[1]} does not exist", key="partition")
        if self.reference_answers is not None and not self.rewards:
            raise UserError("there are no rewards to write", key="reference_answers", hint="leave it out")
        if self.policies and self.reference is None:
            raise UserError("there is nothing to compare them with", key="policies", hint="name a `reference`")
        unread = [name for name in ("precision", "max_length") if is_written(self, name)]
        if self.reference is None and unread:
            raise UserError("is for a `reference`", key=unread[0], hint="leave it out")
        return self


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """One pass of the reference over all answers; what rewards cost is not counted."""
    parts = [
        source_cost(source, f"data.{place}.path", given, "chats", config.bad_rows)
        for place, source in enumerate(config.data)
    ]
    rows, tokens = _share([part.rows for part in parts], config), _share([part.tokens for part in parts], config)
    if config.reference is None:
        return Cost(rows=rows)
    parameters = model_folder.cost(config.reference, "reference", given).parameters
    if tokens is not None and config.policies:
        tokens *= 2  # each answer is read by the model that gave it as well
    flops = 2 * parameters * tokens if parameters and tokens else None
    return Cost(rows=rows, tokens=tokens, flops=flops, parameters=parameters)


def _share(counts: list[float | None], config: Config) -> float | None:
    """The sum of counts in this stage's part; None where one of them is not known."""
    known = [count for count in counts if count is not None]
    return sum(known) / config.partition[1] if len(known) == len(counts) else None


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write `scored.jsonl`, `scores.json` and `samples.jsonl`; returns the manifest's metrics."""
    from posttrain.rewards import answers, scoring

    sources, reference = config.data, None
    policies: dict[str, scoring.Reader] = {}
    if config.reference is not None:
        reference = scoring.Reader.of(config.reference, "reference", config.max_length, sources, config.precision)
        policies = {
            name: scoring.Reader.of(folder, f"policies.{name}", config.max_length, sources, config.precision)
            for name, folder in config.policies.items()
        }
        if reference.encoder.template is None:
            sources = [source.model_copy(update={"as_text": True}) for source in sources]
    check = reference.encoder.encode if reference else None
    found = answers.gather(sources, context.out / scoring.PARTS / "rows", context, config.bad_rows, check)
    which, of = config.partition
    if of > len(found):
        raise UserError(f"{len(found)} prompts can't be divided into {of} parts", key="partition")
    return scoring.score(
        found.share(which, of), config.rewards, context, batch_size=config.batch_size, shown=config.shown,
        reference=reference, policies=policies, reference_answers=config.reference_answers,
    )  # fmt: skip


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
