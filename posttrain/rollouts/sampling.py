"""What samples completions, how TRL asks for them, and their seeds.

The seed of a completion derives from the recipe's seed, the step, its prompt's place in the step, its place among the
prompt's completions, and the turn. So it does not depend on what was sampled before, nor on the number of processes,
and a training that resumes samples the same again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cordee.errors import Fault
from cordee.seeds import seed_of
from posttrain.training.sampling import Sampled, SamplingSettings

HELDOUT = 2**32 - 1
"""In place of the step: held-out prompts are answered by the same seeds each time."""


class Sampler(Protocol):
    """What samples completions from the weights that are trained."""

    def sync(self) -> None:
        """Take the weights as they are now."""

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: SamplingSettings) -> list[Sampled]:
        """Continue each prompt of token ids `[seq]`, by the seed at its place."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass
class CompletionSeeds:
    """The seeds of a batch's completions, turn by turn."""

    keys: Sequence[tuple[int, ...]]
    """Of each completion."""
    turns: list[int] = field(default_factory=list)
    contexts: list[list[int]] = field(default_factory=list)
    """Of each completion, the token ids up to where its last turn ended."""

    def seeds(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """The places of the completions that these token ids belong to, and the seeds of their next turns.

        In the first turn they are all of the batch. Later ones are some of it, in their order, each of which begins
        with what its completion had before: TRL does not say which they are.

        Raises:
            Fault: one goes on from none of them.
        """
        if not self.turns:
            self.turns = [0] * len(prompts)
            places = list(range(len(prompts)))
        else:
            places, at = [], 0
            for ids in prompts:
                while at < len(self.contexts) and list(ids[: len(self.contexts[at])]) != self.contexts[at]:
                    at += 1
                if at == len(self.contexts):
                    raise Fault("a turn goes on from no completion of its batch")
                places.append(at)
                at += 1
        seeds = []
        for place in places:
            seeds.append(seed_of(*self.keys[place], self.turns[place]))
            self.turns[place] += 1
        return places, seeds

    def end(self, places: Iterable[int], prompts: Iterable[Sequence[int]], sampled: Iterable[Sampled]) -> None:
        """Note what followed."""
        self.contexts = self.contexts or [[] for _ in self.keys]
        for place, ids, found in zip(places, prompts, sampled, strict=True):
            self.contexts[place] = [*ids, *found.ids]


def require_ended(sampled: Sequence[Sampled], stops: Sequence[int], longest: int) -> None:
    """See that each completion ends where it should: at its first end token, or at the largest number of tokens.

    Raises:
        Fault: one does not, or a log-probability is missing.
    """
    for one in sampled:
        if not one.ids or len(one.ids) > longest or len(one.ids) != len(one.logprobs):
            raise Fault(f"a completion has {len(one.ids)} tokens and {len(one.logprobs)} log-probabilities")
        if any(token in stops for token in one.ids[:-1]):
            raise Fault("a completion goes on behind its end token")


def asked_of(arguments: Any, *, greedy: bool) -> SamplingSettings:
    """How TRL's config says that completions are drawn; greedy ones take the most likely token each time."""
    if greedy:
        return SamplingSettings(0.0, arguments.max_completion_length, repetition_penalty=arguments.repetition_penalty)
    return SamplingSettings(
        arguments.temperature, arguments.max_completion_length, arguments.top_p, max(0, arguments.top_k),
        arguments.min_p or 0.0, arguments.repetition_penalty,
    )  # fmt: skip
