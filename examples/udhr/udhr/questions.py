"""Chats, preference pairs and questions about passages, with answers that can be checked."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from udhr.passages import Language, Passages, cut

QUESTION = "Which language is this?\n\n{passage}"
SENTENCE = "This passage is in {name}."
CONTINUE = "Continue this text:\n\n{passage}"
Kind = Literal["language", "continue"]
Example = dict[str, Any]


def chats(
    language: Language, counts: Mapping[Kind, int], sentences: float, cutter: Passages, rng: random.Random
) -> Iterator[Example]:
    """The training chats of one language, `counts` of each kind; `passage` is the text taken from the corpus.

    A share `sentences` of the answers that name a language are a sentence.
    """
    for kind, count in counts.items():
        for _ in range(count):
            passage = cutter.draw(language, rng)
            if kind == "language":
                is_sentence = sentences > 0 and rng.random() < sentences
                asked = QUESTION.format(passage=passage)
                answer = SENTENCE.format(name=language.name) if is_sentence else language.name
            else:
                opening, answer = cutter.halve(passage)
                asked = CONTINUE.format(passage=opening)
            messages = [*_message("user", asked), *_message("assistant", answer)]
            yield {"messages": messages, "kind": kind, "language": language.tag, "passage": passage}


def pairs(
    language: Language, others: Sequence[Language], count: int, cutter: Passages, rng: random.Random
) -> Iterator[Example]:
    """Pairs of the correct and a wrong name; the wrong one is of a language with the same script if there is one."""
    wrong = [other for other in others if other.name != language.name]
    alike = [other for other in wrong if other.script == language.script]
    for _ in range(count):
        passage = cutter.draw(language, rng)
        yield {
            "prompt": _message("user", QUESTION.format(passage=passage)),
            "chosen": _message("assistant", language.name),
            "rejected": _message("assistant", rng.choice(alike or wrong).name),
            "answer": language.name,
            "kind": "language",
            "language": language.tag,
            "passage": passage,
        }


def heldout(language: Language, others: Sequence[Language], choices: int, longest: int, seed: int) -> Iterator[Example]:
    """One question per held-out document of a language, with `choices` different names, one of them correct."""
    rng = random.Random(f"{seed}:heldout:{language.tag}")  # noqa: S311 - data, not secrets
    wrong = sorted({other.name for other in others} - {language.name})
    for text, article in language.heldout:
        names = [language.name, *rng.sample(wrong, choices - 1)]
        rng.shuffle(names)
        yield {
            "kind": "language",
            "language": language.tag,
            "language_name": language.name,
            "script": language.script,
            "article": article,
            "prompt": QUESTION.format(passage=cut(text, 0, longest)),
            "answer": language.name,
            "choices": names,
        }


def _message(role: str, content: str) -> list[dict[str, str]]:
    """A list with one message."""
    return [{"role": role, "content": content}]
