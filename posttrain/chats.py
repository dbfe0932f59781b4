"""Builds chats with checkable answers from a corpus's own structure: which language is it, and how does it go on?

    python -m posttrain.chats --config chats.yaml

Training chats and preference pairs are cut from `train.parquet` only, the held-out questions from `heldout.parquet`
only; a training passage that stands in a held-out document, of whatever language, is never used.
"""

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from cordee import files, worker
from cordee.config import Config as Keys
from cordee.config import Input
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.stage import Context

if TYPE_CHECKING:
    from posttrain.passages import Language, Passages

QUESTION = "Which language is this?\n\n{passage}"
CONTINUE = "Continue this text:\n\n{passage}"
CHOICES = 4
Count = Annotated[int, Field(ge=0)]


class Config(Keys):
    """What chats are made of."""

    corpus: Input
    """The corpus (`$corpus`)."""
    languages: list[str] | None = Field(default=None, min_length=CHOICES)
    """Tags of the languages to ask about; all of the corpus if not given; at least 4, for the choices."""
    chats_per_language: dict[Literal["language", "continue"], Count] = Field(default={"language": 80, "continue": 0})
    """Training chats of each kind and language: name the language of a passage; continue an opening."""
    preferences_per_language: Count = 20
    """Pairs of a right and a wrong language name, per language."""
    passage_characters: tuple[int, int] = (40, 160)
    """Shortest and longest passage; a held-out document is cut to the longest. From 8 on."""

    @model_validator(mode="after")
    def _in_order(self) -> "Config":
        if not 8 <= self.passage_characters[0] <= self.passage_characters[1]:
            raise ValueError("passage_characters must be [shortest, longest], and the shortest at least 8")
        return self


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """Chats, and their tokens at three bytes each; unknown where the languages are not listed."""
    del given
    if config.languages is None:
        return Cost()
    rows = len(config.languages) * sum(config.chats_per_language.values())
    return Cost(rows=rows, tokens=rows * (20 + sum(config.passage_characters) / 4))


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write `messages.parquet`, `preferences.parquet`, `heldout.jsonl` and `chats.json`."""
    from posttrain import passages, writing

    languages = passages.read(config.corpus, config.languages)
    if len({language.name for language in languages.values()}) < CHOICES:
        raise UserError(f"fewer than {CHOICES} languages: no choices to offer", file=config.corpus, key="languages")
    cutter = passages.Passages(languages, *config.passage_characters)
    chats: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for done, (tag, language) in enumerate(languages.items()):
        if context.stop_requested():
            context.stop(f"language {done} of {len(languages)}")
        rng = random.Random(f"{context.seed}:{tag}")  # noqa: S311 - data, not secrets
        chats += _chats(config, language, cutter, rng)
        pairs += _pairs(config, language, languages, cutter, rng)
        context.progress(done + 1, len(languages), "languages")
    heldout = list(_heldout(config, languages, context.seed))
    cutter.check([row["passage"] for row in (*chats, *pairs)])
    writing.write_table(context.out / "messages.parquet", chats, ["messages"])
    writing.write_table(context.out / "preferences.parquet", pairs, ["prompt", "chosen", "rejected"])
    writing.write_lines(context.out / "heldout.jsonl", heldout)
    counts = {"rows": len(chats), "preferences": len(pairs), "heldout_rows": len(heldout), "languages": len(languages)}
    per_language = writing.count(chats, pairs, heldout)
    names = {tag: {"name": item.name, "script": item.script, **per_language[tag]} for tag, item in languages.items()}
    summary = {**counts, "passages_refused_as_held_out": cutter.refused, "languages": names}
    files.write_json(context.out / "chats.json", summary)
    return {**counts, "passages_refused_as_held_out": cutter.refused}
