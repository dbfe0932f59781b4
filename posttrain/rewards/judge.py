"""A language model as the judge of answers: it rates each from 1 to 9, or compares two at a time.

The reward is no sampled word but an expectation over the words that it may say, weighted by how likely they are: the
mean of the ratings, or the probability that it prefers an answer. Each two answers are shown in both orders, since
judges lean to a place (Zheng et al. 2023, arXiv 2306.05685).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cordee import model_folder, parts
from cordee.chat.problems import Note
from cordee.chat.templates import Template, common_length, special_tokens
from cordee.compute import adapter, device, engine, next_token, serving
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import UserError
from posttrain.rewards.settings import Reward
from posttrain.rewards.texts import text_of

RATINGS = tuple(map(str, range(1, 10)))
LETTERS = ("A", "B")
LOW_MASS = 0.5
"""A probability of all the words that the judge may say below which it says something else."""
HIGH_DISAGREEMENT = 0.5
"""A share of comparisons with another verdict in the other order above which a judge looks at places, not answers."""
NO_RULES = "A good answer is correct, does what was asked for, and says no more than that."
"""What stands in the place of a constitution where none is given."""
RATE = """\
You judge the answer of an assistant by these principles:

{constitution}

The conversation:

{prompt}

The assistant's answer:

{answer}

Rate how well the answer follows the principles, from 1 (not at all) to 9 (perfectly). Reply with the number only."""
COMPARE = """\
You compare two answers of an assistant by these principles:

{constitution}

The conversation:

{prompt}

Answer A:

{first}

Answer B:

{second}

Which answer follows the principles better? Reply with the letter A or B only."""
Ask = Callable[[Sequence[Sequence[int]], Sequence[int]], torch.Tensor]
"""Log-probabilities `[prompts, tokens]` of the next token."""


@dataclass
class Judge:
    """A judge that is open."""

    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    ask: Ask
    constitution: str
    longest: int
    """Tokens of the longest request."""
    compares: bool
    close: Callable[[], None] = field(default=lambda: None)

    def measure(
        self, prompts: Sequence[Any], completions: Sequence[Any], _columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, float | None]]:
        """The reward of each completion, with the probability of all words that the judge may say (`mass`).

        Of compared answers also the share of comparisons in which the judge prefers what stands in one place
        (`disagreement`); an answer that stands alone has no reward.
        """
        texts = list(map(text_of, completions))
        return self._compared(prompts, texts) if self.compares else self._rated(prompts, texts)

    def _rated(self, prompts: Sequence[Any], texts: Sequence[str]) -> list[dict[str, float | None]]:
        shares, mass = self._shares(
            [RATE.format(constitution=self.constitution, prompt=shown(prompt), answer=text)
             for prompt, text in zip(prompts, texts, strict=True)],
            RATINGS,
        )  # fmt: skip
        means = shares @ torch.tensor([float(rating) for rating in RATINGS], dtype=torch.float64)
        return [{"reward": float(mean), "mass": float(part)} for mean, part in zip(means, mass, strict=True)]

    def _compared(self, prompts: Sequence[Any], texts: Sequence[str]) -> list[dict[str, float | None]]:
        alike: dict[str, list[int]] = {}
        for at, prompt in enumerate(prompts):
            alike.setdefault(parts.line({"prompt": prompt}), []).append(at)
        pairs = [pair for places in alike.values() for pair in itertools.combinations(places, 2)]
        ordered = [order for one, other in pairs for order in ((one, other), (other, one))]
        shares, mass = self._shares(
            [COMPARE.format(constitution=self.constitution, prompt=shown(prompts[one]), first=texts[one],
                            second=texts[other]) for one, other in ordered],
            LETTERS,
        )  # fmt: skip
        found: list[list[tuple[float, float, bool]]] = [[] for _ in prompts]
        for at, (one, other) in enumerate(pairs):
            in_front, behind = float(shares[2 * at, 0]), float(shares[2 * at + 1, 1])
            part = float(mass[2 * at : 2 * at + 2].mean())
            differs = (in_front > 0.5) != (behind > 0.5)
            preferred = (in_front + behind) / 2
            found[one].append((preferred, part, differs))
            found[other].append((1 - preferred, part, differs))
        return [_mean(own) for own in found]

    def _shares(self, questions: Sequence[str], words: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The probability of each word among these, `[questions, words]`, and of all of them together, `[questions]`.

        Raises:
            UserError: a request is too long, or a word is no token of the judge.
        """
        rendered = [self._rendered(question) for question in questions]
        encoded = [self._ids(text) for text in rendered]
        for ids in encoded:
            if len(ids) > self.longest:
                problem = f"a request to the judge has {len(ids)} tokens, and it reads {self.longest}"
                raise UserError(problem, key="rewards: judge", hint="raise max_length, or leave long answers out")
        if not encoded:
            return torch.zeros(0, len(words), dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        tokens = [self._tokens(rendered[0], word) for word in words]
        flat = list(dict.fromkeys(token for own in tokens for token in own))
        probabilities = self.ask(encoded, flat).exp()  # [questions, tokens]
        by_word = torch.stack([probabilities[:, [flat.index(token) for token in own]].sum(1) for own in tokens], dim=1)
        mass = by_word.sum(dim=1)
        return by_word / mass[:, None].clamp_min(torch.finfo(torch.float64).tiny), mass

    def _rendered(self, question: str) -> str:
        # an answer that spells out a special token would end its place in the request
        question = special_tokens(self.tokenizer).sub(lambda found: " ".join(found[0]), question)
        if self.template is None:
            return f"{question}\n\n"
        return self.template.text([{"role": "user", "content": question}], {}, add_generation_prompt=True)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=self.template is None)["input_ids"])

    def _tokens(self, rendered: str, word: str) -> list[int]:
        """The tokens by which the judge may say a word: with a blank before it or none.

        Raises:
            UserError: there is none.
        """
        before, found = self._ids(rendered), []
        for said in (word, f" {word}"):
            ids = self._ids(rendered + said)
            if common_length(before, ids) == len(before) and len(ids) == len(before) + 1:
                found.append(ids[-1])
        if not found:
            raise UserError(f"{word!r} is no token of its own for the judge", key="rewards: judge")
        return found


def _mean(own: Sequence[tuple[float, float, bool]]) -> dict[str, float | None]:
    if not own:
        return {"reward": None}
    names = ("reward", "mass", "disagreement")
    return {
        name: sum(map(float, values)) / len(own) for name, values in zip(names, zip(*own, strict=True), strict=True)
    }


def shown(prompt: Any) -> str:
    """A prompt as the judge reads it: a text as it stands, of messages each with its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.get('role')}: {text_of([message])}" for message in prompt)


def open_judge(reward: Reward, folder: Path, note: Note) -> Judge:
    """Open the judge in a folder, as a reward has it.

    Raises:
        UserError: it is no language model, its engine is not there, or the constitution can't be read.
    """
    settings = engine.Settings(reward.engine or "transformers", reward.max_length, reward.dtype, enforce_eager=True)
    serving.require_served({reward.label: folder}, settings)
    tokenizer = open_tokenizer(model_folder.tokenizer_of(folder))
    template = Template(tokenizer) if tokenizer.chat_template else None
    if template is None:
        note(f"{reward.label}: the judge has no chat template, and continues its request as a text")
    rules = NO_RULES if reward.constitution is None else _read(reward.constitution)
    longest = engine.longest_request(folder, reward.max_length) - 1
    ask, close = _asker(folder, settings, reward.batch_size)
    return Judge(tokenizer, template, ask, rules, longest, reward.compare, close)


def _asker(folder: Path, settings: engine.Settings, batch_size: int) -> tuple[Ask, Callable[[], None]]:
    if settings.name == "vllm":
        engines = serving.Engines(settings, [folder])
        running = engines.load(folder)
        return lambda prompts, tokens: next_token.by_vllm(running, prompts, tokens), engines.stop
    model = adapter.open_served(folder, dtype=settings.torch_dtype).eval().to(device.default())
    return (
        lambda prompts, tokens: next_token.by_transformers(model, prompts, tokens, batch_size=batch_size),
        lambda: None,
    )


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't be read: {error}", file=file, key="rewards: constitution") from error
    if not text:
        raise UserError("is empty", file=file, key="rewards: constitution")
    return text
