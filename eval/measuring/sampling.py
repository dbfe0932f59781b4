"""How answers are drawn: vLLM's sampling keys by its own names, and what they are called by transformers."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from cordee.config import Config
from cordee.errors import UserError


class Sampling(Config):
    """How the next token is drawn; each key means what it means in vLLM's `SamplingParams`."""

    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    """0 is greedy, and the default."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Drawn from the most likely tokens that together have this probability; 1 takes all."""
    top_k: int = Field(default=0, ge=-1)
    """Drawn from so many of the most likely tokens; 0 or -1 takes all."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Drawn from tokens with at least this share of the most likely one's probability; 0 takes all."""
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    """Above 1 against tokens that the prompt or the answer holds; 1 is none."""
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Above 0 against tokens that the answer holds; vLLM only."""
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Above 0 against tokens that the answer holds, for each time; vLLM only."""
    stop: list[Annotated[str, Field(min_length=1)]] | Annotated[str, Field(min_length=1)] = Field(default_factory=list)
    """Texts that end an answer, and are no part of it."""
    min_tokens: int = Field(default=0, ge=0)
    """Tokens before which no answer ends."""
    seed: int | None = Field(default=None, ge=0)
    """Takes the place of the recipe's seed; each answer has a seed of its own, derived from it."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        """Refuse what greedy decoding does not read."""
        for name in ("top_p", "top_k", "min_p", "seed") if self.temperature == 0 else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                problem = f"has no effect at temperature 0, which is greedy: {getattr(self, name)}"
                raise UserError(problem, key=f"sampling.{name}", hint="set temperature beside it")
        return self

    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def for_vllm(self) -> dict[str, Any]:
        """Arguments for `vllm.SamplingParams`."""
        return {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty, "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty, "stop": self.stops(), "min_tokens": self.min_tokens,
        }  # fmt: skip

    def for_transformers(self) -> dict[str, Any]:
        """Fields of `transformers.GenerationConfig`; of `stop_strings` only the text of the answer counts.

        Raises:
            UserError: transformers can't do it.
        """
        for name, value in (("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)):
            if value:
                raise UserError("transformers has no such penalty", key=f"sampling.{name}", hint="engine: vllm has")
        if self.stops() and self.min_tokens:
            problem = "transformers would end an answer at a `stop` text before so many tokens"
            raise UserError(problem, key="sampling.min_tokens", hint="engine: vllm does not")
        drawn = {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": max(0, self.top_k),
            **({"min_p": self.min_p} if self.min_p else {}),
        }  # fmt: skip
        return {
            "do_sample": self.temperature > 0,
            **(drawn if self.temperature > 0 else {}),
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": self.min_tokens or None,
            "stop_strings": self.stops(),
        }
