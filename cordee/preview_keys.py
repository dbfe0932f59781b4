"""What `cordee data` can be told, read before torch is imported: a mistake is answered at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from cordee import recipe
from cordee.chat.named import ChatTemplate
from cordee.chat.source import BadRows, EarlierAnswers, Overlong, Source
from cordee.config import Input, inputs
from cordee.errors import UserError

NO_KEYS = {
    "path": "FILE is the path",
    "weight": "it changes how often a row is seen, and nothing here",
}


class Settings(Source):
    """A source, and what else decides, under the names that the stages that train have for it."""

    max_length: int = Field(default=1024, ge=1)
    """Tokens of the longest sequence, as `trainer.max_length` has it."""
    rows: int | None = Field(default=2000, ge=1)
    """How many of the first rows are looked at; null for all."""
    pairs: bool | None = None
    """Whether rows are read as preference pairs; if not given, as most of the first rows are."""
    base: Input | None = None
    """The model that an adapter was trained on; by default the one that its config names."""
    pad_token: str | None = None
    chat_template: ChatTemplate | None = None
    added_tokens: list[str] = Field(default_factory=list)
    bad_rows: BadRows = "error"
    overlong: Overlong = "error"
    earlier_answers: EarlierAnswers = "own_row"


def read(path: Path, given: Sequence[str]) -> Settings:
    """What is asked for of a file or a folder, by `key=value` pairs of the command line.

    Raises:
        UserError: one is wrong, or there is no such file.
    """
    if not path.exists():
        raise UserError("there is no such file or folder", file=path)
    values: dict[str, Any] = {}
    for item in given:
        recipe.set_value(values, item)
    for key, hint in NO_KEYS.items():
        if key in values:
            raise UserError("is no key of this command", file="command line", key=key, hint=hint)
    settings = recipe.validate(Settings, {"path": str(path), **values}, "command line", "")
    for key, needed in inputs(settings):
        if not needed.exists():
            raise UserError(f"there is no such file or folder: {needed}", file="command line", key=key)
    return settings
