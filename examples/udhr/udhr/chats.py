"""Builds chats, preference pairs and held-out questions from a corpus: name the language, or continue the text.

    python -m udhr.chats --config chats.yaml

Training chats and pairs use passages of `train.parquet` only, held-out questions those of `heldout.parquet` only. A
training passage that also occurs in a held-out document, of any language, is never used.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cordee import files, worker
from cordee.config import Config as Keys
from cordee.config import Input
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.stage import Context

VERSION = 2
CHOICES = 4
Count = Annotated[int, Field(ge=0)]


class Config(Keys):
    """The corpus, the number of chats and their length."""

    corpus: Input
    """The corpus (`$corpus`)."""
    languages: list[str] | None = Field(default=None, min_length=CHOICES)
    """Tags of the languages to ask about, at least 4; default: all languages of the corpus."""
    chats_per_language: dict[Literal["language", "continue"], Count] = Field(default={"language": 80, "continue": 0})
    """Training chats per language and kind: name the language of a passage; continue a text."""
    sentences: float = Field(default=0.0, ge=0, le=1)
    """Share of the answers that name a language in a sentence and not by its name alone."""
    preferences_per_language: Count = 20
    """Preference pairs per language: the correct name against a wrong one."""
    passage_characters: tuple[int, int] = (40, 160)
    """Shortest and longest passage in characters, at least 8; held-out texts are cut to the longest."""

    @model_validator(mode="after")
    def _in_order(self) -> "Config":
        if not 8 <= self.passage_characters[0] <= self.passage_characters[1]:
            raise ValueError("passage_characters must be [shortest, longest], and the shortest at least 8")
        return self


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """Number of chats, and of their tokens at about two characters each; unknown if `languages` is not given."""
    del given
    if config.languages is None:
        return Cost()
    rows = len(config.languages) * sum(config.chats_per_language.values())
    return Cost(rows=rows, tokens=rows * (20 + sum(config.passage_characters) / 4))


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write `messages.parquet`, `preferences.parquet`, `heldout.jsonl` and `chats.json`.

    Raises:
        UserError: the corpus lacks a file, a column, a language, or text that is long enough.
    """
    from udhr import passages, questions

    languages = passages.read(config.corpus, config.languages)
    if len({language.name for language in languages}) < CHOICES:
        raise UserError(
            f"has fewer than {CHOICES} languages, so a question has too few choices",
            file=config.corpus,
            key="languages",
        )
    shortest, longest = config.passage_characters
    cutter = passages.Passages(languages, shortest, longest)
    chats: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    heldout: list[dict[str, Any]] = []
    for done, language in enumerate(languages):
        context.stop_if_asked(f"language {done} of {len(languages)}")
        rng = random.Random(f"{context.seed}:{language.tag}")  # noqa: S311 - data, not secrets
        chats += questions.chats(language, config.chats_per_language, config.sentences, cutter, rng)
        pairs += questions.pairs(language, languages, config.preferences_per_language, cutter, rng)
        heldout += questions.heldout(language, languages, CHOICES, longest, context.seed)
        context.progress(done + 1, len(languages), "languages")
    cutter.check([row.pop("passage") for row in (*chats, *pairs)])
    _write_table(context.out / "messages.parquet", chats, ["messages"], ["kind", "language"])
    columns = ["prompt", "chosen", "rejected"], ["answer", "kind", "language"]
    _write_table(context.out / "preferences.parquet", pairs, *columns)
    files.write_text(
        context.out / "heldout.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in heldout)
    )
    counts = {"rows": len(chats), "preferences": len(pairs), "heldout_rows": len(heldout), "languages": len(languages)}
    counts["passages_refused_as_held_out"] = cutter.refused
    per_language = {
        item.tag: {"name": item.name, "script": item.script, "heldout": len(item.heldout)} for item in languages
    }
    plan = {"chats": config.chats_per_language, "preferences": config.preferences_per_language}
    files.write_json(context.out / "chats.json", {**counts, "per_language": plan, "languages": per_language})
    return counts


def _write_table(path: Path, rows: list[dict[str, Any]], messages: Sequence[str], texts: Sequence[str]) -> None:
    """Write a Parquet file atomically; the columns `messages` are lists of {role, content}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    talk = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema([*((name, talk) for name in messages), *((name, pa.string()) for name in texts)])
    beside = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema), beside)
    beside.replace(path)


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
