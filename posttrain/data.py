"""Mixes data of any shape (chats, pairs, prompts, answers): amounts, duplicates, benchmarks' questions, licences.

    python -m posttrain.data --config FILE [key=value …]

Writes `data.jsonl`, which every `data:` key reads, with the rows as they were and a column `source`; and the data card,
`card.md` and `card.json`. Sources are streamed twice. Memory holds 17 bytes of a row, and about 60 more while
duplicates and amounts are worked out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from cordee import files, worker
from cordee.chat.source import BadRows, Source
from cordee.config import Config as StageConfig
from cordee.config import Input
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.stage import Context
from posttrain.mixing.settings import Deduplicate, Licenses, MixtureSource, TooFew
from posttrain.training.cost import BYTES_PER_TOKEN

if TYPE_CHECKING:
    from posttrain.mixing.decontamination import Questions
    from posttrain.mixing.scan import Encode, Scanned

VERSION = 2
DATA, CARD, PAGE, ROWS, SCAN = "data.jsonl", "card.json", "card.md", "rows.json", "scan"


class Config(StageConfig):
    """What is mixed, how much of it, and what is left out."""

    data: list[MixtureSource] = Field(min_length=1)
    """The sources; of rows that repeat each other, that of the first source stays. At least one."""
    rows: int | None = Field(default=None, ge=1)
    """Rows of the mixture, of which each source gives its `weight`'s part; without it and `tokens`, a source's rows
    stand there `weight` times. At least 1."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens of the mixture, likewise: a source's last row is the one with which its part is reached; at least 1."""
    too_few: TooFew = "error"
    """Where a source has less than its part of `rows` or `tokens`: an error, its rows are repeated, or the mixture is
    smaller."""
    model: Input | None = None
    """The model or tokenizer whose tokens are counted, and in whose tokens `against` is sought."""
    bad_rows: BadRows = "error"
    """What is done with rows that can't be read: an error that counts them, or they are dropped and counted."""
    deduplicate: Deduplicate = "exact"
    """Which rows count as repeated: those whose prompts and answers are equal but for case, blanks and Unicode's forms;
    `near`: and those that are as similar as `similarity` says; `off`: none."""
    similarity: float = Field(default=0.8, ge=0.3, le=1.0)
    """From which Jaccard similarity of their sets of five characters two rows are near duplicates; 0.3 to 1."""
    against: list[Source] = Field(default=[])
    """Benchmarks' questions that no row may hold: `$questions` (the stage eval.questions), or files with `prompt`. A
    row's `task` names its benchmark, else the file."""
    licenses: Licenses | None = None
    """Which licences rows may have: `allow: […]`, `deny: […]`; none: any."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rows is not None and self.tokens is not None:
            raise UserError("the mixture has a number of rows or of tokens", key="tokens", hint="leave one out")
        if self.too_few != "error" and self.rows is None and self.tokens is None:
            raise UserError("is for a number of `rows` or `tokens`", key="too_few", hint="leave it out")
        if self.similarity != type(self).model_fields["similarity"].default and self.deduplicate != "near":
            raise UserError(f"is for near, not for {self.deduplicate}", key="similarity", hint="`deduplicate: near`")
        needing = [name for name in ("tokens", "against") if getattr(self, name)]
        needing += ["data.max_tokens" for source in self.data if source.max_tokens is not None]
        if needing and self.model is None:
            hint = f"`model:` names a model or tokenizer, for {needing[0]}"
            raise UserError("missing: tokens are counted by a tokenizer", key="model", hint=hint)
        for key, sources in (("data", self.data), ("against", self.against)):
            for at, source in enumerate(sources):
                if source.as_text:
                    hint = "write it beside this mixture there"
                    raise UserError("says how a training reads rows", key=f"{key}.{at}.as_text", hint=hint)
        return self


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """At most: rows and tokens of the sources, as often as their weights say, or as many as were asked for."""
    from cordee.chat.selection import files_of
    from cordee.data import rows

    total, tokens = 0.0, 0.0
    for at, source in enumerate(config.data):
        if not source.path.exists():
            made = given.get(f"data.{at}.path", Cost())
            if made.rows is None:
                return Cost(rows=config.rows, tokens=config.tokens)
            count, own = made.rows, made.tokens or 0.0
        else:
            count, size = rows.estimate(files_of(source).documents, f"data.{at}.path")
            own = size / BYTES_PER_TOKEN
        kept = min(count, source.limit or count, source.max_rows or count)
        total += kept * source.weight
        tokens += min(own * kept / max(count, 1.0), source.max_tokens or own) * source.weight
    share = min((config.rows or total) / max(total, 1.0), (config.tokens or tokens) / max(tokens, 1.0))
    return Cost(rows=total * share, tokens=tokens * share)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Read, judge, count and write; returns the manifest's metrics."""
    from posttrain.mixing import amounts, card, duplicates, scan, writing

    folder = context.out / SCAN
    sources, questions = _scanned(config, context, folder)
    first = duplicates.mark(sources, config.deduplicate, config.similarity, folder)
    supplies = [
        amounts.Supply(
            one.name, one.columns["tokens"].astype("int64"), one.kept,
            one.source.weight, one.source.max_rows, one.source.max_tokens,
        )
        for one in sources
    ]  # fmt: skip
    copies = amounts.copies(supplies, config.rows, config.tokens, config.too_few, context.seed)
    if not sum(int(count.sum()) for count in copies):
        raise UserError("no row is left", key="data", hint=_why(sources))
    writing.write(context.out / DATA, sources, copies, first, context)
    names = ("rows", "tokens", "too_few", "bad_rows", "deduplicate", "similarity")
    asked = {name: getattr(config, name) for name in names} | {"seed": context.seed}
    asked["licenses"] = config.licenses.model_dump() if config.licenses else None
    told = card.card(sources, copies, questions, asked, has_tokens=config.model is not None)
    files.write_json(context.out / CARD, told)
    files.write_text(context.out / PAGE, card.page(told))
    files.write_json(context.out / ROWS, card.rows_file(told))
    for one in told["sources"]:
        for kind in one["left_out"]:
            context.note(f"{one['name']}: {kind['rows']} rows left out: {kind['problem']}")
    scan.forget(folder)
    return {
        "rows": told["rows"],
        **({} if told["tokens"] is None else {"tokens": told["tokens"]}),
        "rows_read": sum(map(len, sources)),
        "rows_left_out": sum(kind["rows"] for one in told["sources"] for kind in one["left_out"]),
        "rows_contaminated": sum(sum(one["contaminated"].values()) for one in told["sources"]),
    }


def _scanned(config: Config, context: Context, folder: Path) -> "tuple[list[Scanned], Questions | None]":
    """The sources after the first pass, and the questions of benchmarks."""
    from posttrain.mixing import scan

    encode = _encoder(config.model)
    questions = _questions(config, encode) if config.against and encode else None
    rules = scan.Rules(config.bad_rows, config.licenses, encode, questions, config.deduplicate == "near")
    for task, count in questions.too_short.items() if questions else ():
        context.note(f"{count} questions of {task} are too short to be found in rows")
    found = []
    for at, (name, source) in enumerate(zip(_names(config.data), config.data, strict=True)):
        found.append(scan.scan(source, name, rules, context, folder / str(at)))
    return found, questions


def _encoder(model: Path | None) -> "Encode | None":
    """Gives the token ids of texts, without those that a tokenizer puts around them."""
    if model is None:
        return None
    from cordee import model_folder
    from cordee.compute.tokenizer import open_tokenizer

    opened = open_tokenizer(model_folder.tokenizer_of(model), key="model")

    def encode(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = opened(texts, add_special_tokens=False)["input_ids"] if texts else []
        return ids

    return encode


def _questions(config: Config, encode: "Encode") -> "Questions":
    """All questions of `against`.

    Raises:
        UserError: a row of one is no question.
    """
    from cordee.chat import formats
    from cordee.chat.problems import Problems
    from cordee.chat.selection import files_of, selected
    from posttrain.mixing import texts
    from posttrain.mixing.decontamination import Question, Questions

    found: list[Question] = []
    for name, source in zip(_names(config.against), config.against, strict=True):
        problems, total = Problems(), 0
        for rows in selected(source, files_of(source).documents, 0):
            total += len(rows)
            tasks, asked = [], []
            for row in rows:
                with problems.of(row.file, row.number, row.values):
                    values = formats.columns_of(row, source)
                    asked.append(texts.normalised(texts.read(values).asked))
                    tasks.append(str(values.get("task", name)))
            ids = encode(asked)
            found += [Question(*one) for one in zip(tasks, asked, map(tuple, ids), strict=True)]
        problems.raise_any(source.path, total)
    if not found:
        raise UserError("holds no questions", key="against")
    return Questions(found)


def _names(sources: list[Any]) -> list[str]:
    """What sources are called: their `name`, or that of their file or folder; the second of a name gets a number."""
    found: list[str] = []
    for source in sources:
        name = getattr(source, "name", None) or source.path.name.partition(".")[0] or source.path.name
        taken = sum(one == name or one.startswith(f"{name}-") for one in found)
        found.append(f"{name}-{taken + 1}" if name in found else name)
    return found


def _why(sources: "list[Scanned]") -> str:
    kinds = [(kind.rows, one.name, kind.problem) for one in sources for kind in one.left_out.values()]
    return "; ".join(f"{rows} rows of {name}: {problem}" for rows, name, problem in sorted(kinds, reverse=True)[:3])


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
