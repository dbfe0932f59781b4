"""Reads an open corpus, keeps some languages, and holds documents out for evaluation.

    python -m pretrain.corpus --config corpus.yaml

The files are read twice: first to find what can't be a document, the types of the columns and the texts that are held
out, then to write. Training documents whose text is held out are dropped.
"""

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from cordee import worker
from cordee.config import Config as BaseConfig
from cordee.config import Input
from cordee.cost import Cost
from cordee.errors import UserError, nearest
from cordee.files import write_json
from cordee.stage import Context

if TYPE_CHECKING:
    from pretrain.data.survey import Survey


VERSION = 3


class Config(BaseConfig):
    """What is read, what is kept, what is held out."""

    source: Input
    """A .parquet, .arrow, .jsonl, .ndjson, .json, .csv, .tsv or .txt file with a column `text`, the last six also as
    .gz, .zst or .bz2, or a folder of such files. All other columns are carried."""
    files: list[str] | None = Field(default=None, min_length=1)
    """Patterns below a folder, such as `train/*.parquet`, that name the files to read; if not given, all data files but
    hidden ones, licences and readmes."""
    split: str | None = Field(default=None, min_length=1)
    """The split of a folder to read, as names of files, a saved `DatasetDict` or a header in `README.md` tell of them;
    all if not given."""
    subset: str | None = Field(default=None, min_length=1)
    """The subset of a folder to read, where the header of its `README.md` names several; if not given, all, or the
    default one of a `split`."""
    languages: list[str] | None = Field(default=None, min_length=1)
    """Tags (BCP 47) of the languages to keep, by the column `language`, "" for documents without one; all if not
    given."""
    holdout: dict[str, list[bool | int | float | str]] = Field(default={})
    """Column → values; a document is held out if any of its columns has one of the values."""
    holdout_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of documents to hold out by a hash of text and seed, for corpora without such a column: 0 to 1."""
    bad_rows: Literal["error", "drop"] = "error"
    """What is done with rows that can't be documents (no text, empty text, not UTF-8, no JSON): an error that counts
    them, or they are dropped and counted in `corpus.json`."""

    @field_validator("files")
    @classmethod
    def _below_the_folder(cls, patterns: list[str] | None) -> list[str] | None:
        for pattern in patterns or []:
            if not pattern or PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
                raise ValueError(f"{pattern!r} leads out of the folder")
        return patterns

    @model_validator(mode="after")
    def _one_way_to_choose_and_to_hold_out(self) -> "Config":
        if self.files and (self.split or self.subset):
            raise ValueError("give one of files, and split or subset")
        if bool(self.holdout) == bool(self.holdout_fraction):
            raise ValueError("give one of holdout and holdout_fraction")
        if empty := [column for column, values in self.holdout.items() if not values]:
            raise ValueError(f"holdout.{empty[0]} names no value")
        return self


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """Rows and tokens of the training split; tokens guessed from the size of the text."""
    del given
    from cordee.data.folder import find_files
    from pretrain.data.estimate import training_rows_and_bytes
    from pretrain.data.reading import BYTES_PER_TOKEN

    found = find_files(config.source, config.files, config.split, config.subset).documents
    rows, text_bytes = training_rows_and_bytes(found, config.languages, config.holdout)
    kept = 1 - config.holdout_fraction
    return Cost(tokens=text_bytes * kept / BYTES_PER_TOKEN, rows=None if rows is None else round(rows * kept))


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write `train.parquet`, `heldout.parquet` and `corpus.json`.

    Raises:
        UserError: there is nothing to read, to hold out or to train on, or a row can't be a document.
    """
    from cordee.data import folder
    from pretrain.data import columns, splits
    from pretrain.data.selection import Selection
    from pretrain.data.survey import duplicates, shown, take

    found = folder.find_files(config.source, config.files, config.split, config.subset)
    if config.source.is_dir():
        context.note(folder.shown(config.source, found))
        if not (config.files or config.split) and (splits_shown := folder.splits_shown(config.source, found)):
            context.note(splits_shown)
    selection = Selection(config.languages, config.holdout, config.holdout_fraction, context.seed)
    survey = take(found.documents, selection, context)
    _require_a_corpus(survey, config)
    if survey.bad.counts:
        context.note(f"{survey.bad.shown(config.source)}; dropped")
    if config.languages and "" not in config.languages and (left_out := survey.tags[""]):
        context.note(f'{left_out} documents have no language and are left out (languages: [""] keeps them)')
    if (repeated := duplicates(survey)).total:
        context.note(shown(survey, repeated, config.source))
    context.out.mkdir(parents=True, exist_ok=True)
    train, heldout, types = splits.write(survey, selection, context)
    if as_json := [name for name, kind in types.items() if kind is None]:
        context.note(f"written as JSON text, since no one type holds their values: {', '.join(as_json)}")
    if not train.documents:
        raise UserError("every training document's text is held out too", file=config.source, key="holdout")
    leaked = len(survey.texts) - train.documents.total() - heldout.documents.total()
    if leaked:
        context.note(f"{leaked} training documents dropped: their text is held out too")
    between = sum(repeated.between.values())
    summary = {
        **splits.describe(train, heldout),
        "columns": columns.described(types),
        "bad_rows": survey.bad.described(config.source),
        "duplicates": {"within_files": repeated.within, "between_files": between},
    }
    write_json(context.out / "corpus.json", summary)
    return {
        "rows": train.documents.total(),
        "heldout_rows": heldout.documents.total(),
        "train_bytes": train.bytes.total(),
        "heldout_bytes": heldout.bytes.total(),
        "languages": len(summary["languages"].keys() - {""}),
        "files": len(found.documents),
        "files_not_read": found.num_skipped,
        "bad_rows_dropped": survey.bad.counts.total(),
        "duplicate_rows": repeated.total,
        "duplicates_dropped": leaked,
    }


def _require_a_corpus(survey: "Survey", config: Config) -> None:
    """Check that what was read can be split.

    Raises:
        UserError: it can't.
    """
    bad, source = survey.bad, config.source
    if bad.counts and config.bad_rows == "error":
        hint = f'{bad.hint} "bad_rows: drop" leaves them out'.strip()
        raise UserError(bad.shown(source), file=source, key="bad_rows", hint=hint)
    if not survey.tags:
        why = f": {bad.shown(source)}" if bad.counts else ""
        raise UserError(f"holds no document{why}", file=source, key="source", hint=bad.hint)
    for tag in config.languages or []:
        if tag not in survey.tags:
            problem = f"no document is in {tag!r}" if tag else "every document has a language"
            raise UserError(problem, file=source, key="languages", hint=_near(tag, set(survey.tags)))
    for column, value in sorted(survey.unmatched, key=str):
        known = {*survey.types, "text"}
        hint = "" if column in known else nearest(column, known)
        raise UserError(f"no document has {column} = {value!r}", file=source, key=f"holdout.{column}", hint=hint)
    kept, heldout = len(survey.texts), len(survey.heldout)
    key = "holdout" if config.holdout else "holdout_fraction"
    if not heldout:
        raise UserError(f"holds out none of {kept} documents", file=source, key=key)
    if heldout == kept:
        raise UserError(f"holds out all {kept} documents, so none is left to train on", file=source, key=key)


def _near(tag: str, tags: set[str]) -> str:
    """A hint: the tag's own variants (`rm` → `rm-sursilv`), or else the most similar tag."""
    if variants := sorted(known for known in tags if known.startswith(f"{tag}-")):
        return f"there is {', '.join(variants)}"
    return nearest(tag, tags - {""}) if tags != {""} else "its documents have no language tag"


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
