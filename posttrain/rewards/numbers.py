"""Reads the number that an answer ends with, exactly: decimals, fractions, LaTeX, and GSM8K's `####`."""

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,3}}(?![\w.]))?"
_NUMBER = re.compile(
    rf"""(?<![\w.])(?P<sign>[-+])?[$€£]?(?P<minus>-)?(?:
      \\[dt]?frac\s*\{{\s*(?P<top>-?{_DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>-?{_DECIMAL})\s*\}}
      | \\[dt]?frac\s*(?P<upper>\d)\s*(?P<lower>\d)
      | (?P<whole>\d+)\s+(?P<part>\d+)/(?P<of>\d+)(?![\d/])
      | (?P<over>{_DECIMAL})\s?/\s?(?P<under>{_DECIMAL})(?![\d/])
      | (?P<plain>{_DECIMAL})
    )""",
    re.VERBOSE,
)
"""A number that does not continue a word: in `x2 = 10-5` these are 10 and 5."""
MINUS = "\u2212"
"""The sign as it is typeset."""
_MARK, _BOXED = re.compile(r"####(?=\s*[-+$€£.\\\d])"), "\\boxed{"
"""The first is a heading where no number follows."""
_THOUSANDS = re.compile(r"(?<=\d)(?:,\\!|\{,\}|\\[,!;: ]|['\u2019])(?=\d{3}(?!\d))")
"""How LaTeX and the Swiss separate them."""
_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d.,])")
_POWER = re.compile(r"(?<=[A-Za-z}])\^(?:\{-?\d+\}|-?\d+)")
"""Of a unit or a variable."""


def last_number(text: str) -> Fraction | None:
    r"""The number that a text gives as its answer; None where it gives none.

    That is what follows the last `####`, else what the last `\boxed{…}` holds, else the last number of the text.
    Thousands are separated by commas, as LaTeX does, by apostrophes, and behind `####` or in `\boxed{…}` by spaces;
    signs of currency and of percent, and powers of units, are left out.
    """
    text = _POWER.sub("", _THOUSANDS.sub(",", text.replace(MINUS, "-")))
    if marks := [*_MARK.finditer(text)]:
        return _first(_alone(text[marks[-1].end() :]))
    if _BOXED in text:
        return _last(_alone(_braced(text.rpartition(_BOXED)[2])))
    return _last(text)


def _alone(text: str) -> str:
    """What is an answer by itself: a sign may stand apart from its number, and spaces between thousands."""
    joined = _SPACED.sub(lambda found: found[0].replace(" ", ","), text.strip())
    return re.sub(r"^([-+])\s+", r"\1", joined)


def _braced(text: str) -> str:
    """A text up to the brace that closes what was opened before it."""
    depth = 1
    for place, sign in enumerate(text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if not depth:
            return text[:place]
    return text


def _first(text: str) -> Fraction | None:
    return next(filter(lambda value: value is not None, map(_value, _NUMBER.finditer(text))), None)


def _last(text: str) -> Fraction | None:
    found = [value for value in map(_value, _NUMBER.finditer(text)) if value is not None]
    return found[-1] if found else None


def _value(found: re.Match[str]) -> Fraction | None:
    """The value of a number as it was found; None of a division by zero."""
    sign = -1 if "-" in (found["sign"], found["minus"]) else 1

    def of(name: str) -> Fraction:
        return Fraction(found[name].replace(",", ""))

    for above, below in (("top", "bottom"), ("upper", "lower"), ("over", "under")):
        if found[above]:
            return sign * of(above) / of(below) if of(below) else None
    if found["whole"]:
        return sign * (of("whole") + of("part") / of("of")) if of("of") else None
    return sign * of("plain")
