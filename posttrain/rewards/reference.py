"""The log-probabilities of answers under a reference model, for methods that compare a policy with it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cordee import model_folder
from cordee.chat import completions
from cordee.chat.problems import BadRowError
from cordee.chat.schema import Record
from cordee.chat.source import Limits, Source
from cordee.chat.templates import Template
from cordee.compute import adapter, device, logprobs
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import UserError
from posttrain.rewards.answers import Answer

LOGPROB, TOKENS = "logprob", "tokens"
SAMPLED, SAMPLED_TOKENS = "sampled_logprob", "sampled_tokens"
"""Up to the token that ends a generation: the line end that ChatML's templates write after it is not sampled."""


@dataclass(frozen=True)
class Encoder:
    """How the reference reads answers: in its own chat template and tokens."""

    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    limits: Limits
    sources: Sequence[Source]

    @classmethod
    def of(cls, folder: Path, max_length: int | None, sources: Sequence[Source], key: str) -> "Encoder":
        """The encoder of the model or adapter in a folder, which stands under a key."""
        tokenizer = open_tokenizer(model_folder.tokenizer_of(folder), key=key)
        template = Template(tokenizer) if tokenizer.chat_template else None
        return cls(tokenizer, template, Limits(max_length, model_folder.positions(folder), len(tokenizer)), sources)

    def encode(self, answer: Answer) -> tuple[list[int], int] | None:
        """The ids of a prompt with its answer, and where that begins; None of an answer that says nothing.

        Raises:
            BadRowError: it can't be rendered, or is too long.
        """
        if answer.is_empty:
            return None
        if isinstance(answer.prompt, str):
            prompt, said = completions.of_text(answer.prompt, answer.completion, self.tokenizer)
        elif self.template is None:
            raise BadRowError("is a chat, and the reference has no chat template", hint="`as_text: true`")
        else:
            source, options = self.sources[answer.source], ("tools", "documents", "chat_template_kwargs")
            beside = {name: answer.values[name] for name in options if name in answer.values}
            row = {"messages": [*answer.prompt, *answer.completion], **beside}
            record = Record(answer.file, answer.number, row)
            prompt, said = completions.of_chat(record, self.template, source.ignore)
        if not prompt:
            raise BadRowError("nothing stands before the answer's first token")
        self.limits.check([*prompt, *said])
        return [*prompt, *said], len(prompt)


@contextmanager
def opened(folder: Path, encoder: Encoder, precision: str, only: str | None) -> Iterator[Any]:
    """What gives answers their log-probability and number of tokens, all and sampled; None of one that says nothing.

    Weights are float32, and matrices are multiplied in `precision`, as in training. With `only`, answers of other
    `model`s are left out.

    Raises:
        UserError: the folder is no model.
        Fault: it is damaged.
    """
    model = adapter.open_served(folder, dtype=torch.float32).eval().to(device.default())
    if encoder.limits.vocab_size > (rows := model.get_input_embeddings().weight.shape[0]):
        raise UserError(f"its tokenizer has {len(encoder.tokenizer)} tokens, its embedding {rows} rows", file=folder)
    half, stops = precision == "bfloat16", set(adapter.stop_token_ids(folder))

    def told(ids: list[int], start: int, logps: torch.Tensor) -> dict[str, Any]:
        said = ids[start:]
        until = next((at for at, token in enumerate(said, 1) if token in stops), len(said))
        sampled = {SAMPLED: float(logps[:until].sum()), SAMPLED_TOKENS: until}
        return {LOGPROB: float(logps.sum()), TOKENS: len(said), **sampled}

    def measure(answers: Sequence[Answer]) -> list[dict[str, Any]]:
        is_asked = [only is None or answer.values.get("model") == only for answer in answers]
        encoded = [encoder.encode(answer) if asked else None for answer, asked in zip(answers, is_asked, strict=True)]
        sequences = [one for one in encoded if one is not None]
        with torch.autocast(device.default().type, torch.bfloat16, enabled=half):
            found = iter(logprobs.completion_logprobs(model, sequences))
        none = dict.fromkeys((LOGPROB, TOKENS, SAMPLED, SAMPLED_TOKENS))
        return [none if one is None else told(*one, next(found)) for one in encoded]

    yield measure
