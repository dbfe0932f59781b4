"""One model's answers on the disk: part by part while they are generated, then as one file of JSON lines.

A part (`cordee.parts`) is the answers to consecutive prompts, `parts/<model>/<first>-<end>.jsonl`. Memory holds one.
"""

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cordee import parts
from cordee.chat import formats
from cordee.compute.generating import Generated
from cordee.seeds import seed_of
from cordee.stage import Context
from eval.measuring.prompts import Prompt, Prompts, plain

PARTS, ANSWERS = "parts", "answers"
OWN = ("prompt_id", "sample", "model", "finish_reason", "tokens", "special_tokens")
"""What a row says of its answer."""
LEFT_OUT = {*formats.COLUMNS, "label", "messages", "answer", *OWN}
"""Columns of a prompt that are not carried to its answers as they are: they hold, or judge, another answer."""
Ask = Callable[[Sequence[Prompt], Sequence[int]], list[Generated]]
"""Answers prompts, given the seeds of all answers: those of the first prompt, then those of the next."""


@dataclass(frozen=True)
class Writer:
    """Writes a model's answers."""

    out: Path
    """The stage's folder."""
    model: str
    as_text: bool
    """Whether a row is a text, as the model has no chat template; else it is a chat."""
    samples: int
    """Answers to each prompt."""
    seed: int
    """From it, each answer's own is derived."""

    @property
    def file(self) -> Path:
        """What holds all answers in the end; it appears whole."""
        return self.out / ANSWERS / f"{self.model}.jsonl"

    def write(self, prompts: Prompts, at_once: int, ask: Ask, context: Context, before: int, total: int) -> None:
        """Generate the answers that are missing, and make one file of all.

        Args:
            prompts: all of them.
            at_once: answers of a part; all answers to a prompt are in the same one.
            ask: the model.
            context: told of progress, and asked for a stop.
            before: answers of other models that are done.
            total: answers of all models.

        Raises:
            Stopped: a stop was asked for.
        """
        folder, coming, at = self.out / PARTS / self.model, iter(prompts), 0
        folder.mkdir(parents=True, exist_ok=True)
        size = max(1, at_once // self.samples)
        for end, is_there in parts.ends(folder, len(prompts), size):
            part = list(itertools.islice(coming, end - at))
            if not is_there:
                done = before + at * self.samples
                context.progress(done, total, "answers")
                if context.stop_requested():
                    context.stop(f"answer {done} of {total}")
                parts.write(folder, at, end, self._rows(part, ask))
            at = end
        parts.join(folder, self.file)
        shutil.rmtree(folder)

    def _rows(self, part: Sequence[Prompt], ask: Ask) -> list[dict[str, Any]]:
        """The answers to some prompts, as they are written."""
        places = [(prompt, sample) for prompt in part for sample in range(self.samples)]
        answers = ask(part, [seed_of(self.seed, prompt.number, sample) for prompt, sample in places])
        return [self._row(*place, answer) for place, answer in zip(places, answers, strict=True)]

    def _row(self, prompt: Prompt, sample: int, answer: Generated) -> dict[str, Any]:
        said: dict[str, Any]
        if self.as_text:
            said = {"prompt": plain(prompt), "completion": answer.text}
        else:
            said = {"messages": [*map(_given, prompt.messages), {"role": "assistant", "content": answer.text}]}
        others = {name: value for name, value in prompt.record.values.items() if name not in LEFT_OUT}
        reference = {} if prompt.answer is None else {"answer": prompt.answer}
        own = (prompt.number, sample, self.model, answer.finish_reason, answer.tokens, answer.special)
        return {**said, **reference, **others, **dict(zip(OWN, own, strict=True))}


@dataclass
class Told:
    """What a model's answers are, counted over all of its file, and some of them."""

    answers: int = 0
    tokens: int = 0
    cut: int = 0
    """Answers that the largest number of tokens cut off."""
    empty: int = 0
    special: int = 0
    """Answers with special tokens, which their texts lack."""
    shown: dict[int, str] = field(default_factory=dict)
    """Of the prompts to show, the first answer, by the prompt's number."""


def tell(file: Path, shown: set[int]) -> Told:
    """Read a file of answers, line by line."""
    told = Told()
    for row in parts.lines(file):
        text = row["completion"] if "completion" in row else row["messages"][-1]["content"]
        told.answers += 1
        told.tokens += row["tokens"]
        told.cut += row["finish_reason"] == "length"
        told.empty += not text.strip()
        told.special += row["special_tokens"] > 0
        if row["prompt_id"] in shown and row["sample"] == 0:
            told.shown[row["prompt_id"]] = text
    return told


def _given(message: dict[str, Any]) -> dict[str, Any]:
    """A message of the prompt: an answer in it is not the model's, and is not trained on."""
    if message.get("role") != "assistant":
        return message
    return {**{key: value for key, value in message.items() if key != "weight"}, "train": False}
