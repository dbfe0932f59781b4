"""Reads the number that an answer ends with, exactly: decimals, fractions, LaTeX, and GSM8K's `####`."""

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,3}}(?![\w.]))?"
_NUMBER = re.compile(
    rf"""(?<![\w.])(?P<sign>[-+])?[$€£]?(?P<minus>-)?(?:
      \\[dt]?frac\s*\{{\s*(?P<top>-?{_DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>-?{_DECIMAL})\s*\}}
      | (?P<whole>\d+)\s+(?P<part>\d+)/(?P<of>\d+)(?![\d/])
      | (?P<over>{_DECIMAL})\s?/\s?(?P<under>{_DECIMAL})(?![\d/])
      | (?P<plain>{_DECIMAL})
    )""",
    re.VERBOSE,
)
"""A number that does not continue a word: in `x2 = 10-5` these are 10 and 5."""
MINUS = "\u2212"
"""The sign as it is typeset."""
_MARK, _BOXED = "####", "\\boxed{"


def last_number(text: str) -> Fraction | None:
    r"""The number that a text gives as its answer; None where it gives none.

    That is what follows the last `####`, else what the last `\boxed{…}` holds, else the last number of the text.
    Thousands are separated by commas; signs of currency and of percent are left out.
    """
    text = text.replace(MINUS, "-")
    if _MARK in text:
        return _first(text.rpartition(_MARK)[2])
    if _BOXED in text:
        return _last(_braced(text.rpartition(_BOXED)[2]))
    return _last(text)


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

    for above, below in (("top", "bottom"), ("over", "under")):
        if found[above]:
            return sign * of(above) / of(below) if of(below) else None
    if found["whole"]:
        return sign * (of("whole") + of("part") / of("of")) if of("of") else None
    return sign * of("plain")
