"""What a mixture can be told of its sources and their licences."""

from fnmatch import fnmatchcase
from typing import Literal, Self, TypeAlias

from pydantic import Field, model_validator

from cordee.chat.source import Source
from cordee.config import Config
from cordee.errors import UserError

TooFew: TypeAlias = Literal["error", "repeat", "accept"]
Deduplicate: TypeAlias = Literal["off", "exact", "near"]


class MixtureSource(Source):
    """One file or folder of rows, and how much of it goes into the mixture."""

    name: str | None = None
    """What its rows are called in the column `source`; by default the name of the file or folder."""
    weight: float = Field(default=1.0, gt=0)
    """How often each row stands in the mixture: 0.5 takes a random half of them, 2 all of them twice. Where the stage
    has `rows` or `tokens`, the source's part of them, relative to the other weights; above 0."""
    max_rows: int | None = Field(default=None, ge=1)
    """At most so many different rows, drawn by the seed from those that no filter takes away; at least 1."""
    max_tokens: int | None = Field(default=None, ge=1)
    """At most so many tokens of different rows; at least 1."""
    license: str | None = None
    """The licence of the rows that have no column `license` or `licence`."""
    language: str | None = None
    """The language of the rows that have no column `language`."""


class Licenses(Config):
    """Which licences rows may have. Case, blanks and underscores don't tell two apart; `*` stands for anything."""

    allow: list[str] = Field(default=[])
    """Rows with another licence, or with none, are left out; empty: all are allowed."""
    deny: list[str] = Field(default=[])
    """Rows with one of these are left out, allowed or not."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.allow and not self.deny:
            raise UserError("names no licence", key="licenses", hint="`allow: [apache-2.0, cc-by*]`, or `deny: […]`")
        return self

    def problem(self, licence: str) -> str | None:
        """Why a row with a licence ("" for none) is left out; None where it is not."""
        if licence and any(fnmatchcase(_plain(licence), _plain(one)) for one in self.deny):
            return f"its licence {licence} is denied"
        if self.allow and not licence:
            return "no licence is told"
        if self.allow and not any(fnmatchcase(_plain(licence), _plain(one)) for one in self.allow):
            return f"its licence {licence} is not allowed"
        return None


def _plain(licence: str) -> str:
    return "-".join(licence.casefold().replace("_", " ").split())
