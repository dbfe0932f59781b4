"""Numbers formatted for people: units, signs, superscripts, significant digits."""

import math
from typing import Any

MINUS, NO_VALUE = "\N{MINUS SIGN}", "\N{EN DASH}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TIMES = "\N{MULTIPLICATION SIGN}"


def count(value: float | None) -> str:
    """`5,412`, from a million on `5.4 M`, then `B` and `T`."""
    if value is None:
        return NO_VALUE
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{_three_digits(value / limit)} {letter}"
    return f"{value:,.0f}".replace("-", MINUS)


def power(value: float | None) -> str:
    """A mantissa and a power of ten, with superscripts."""
    if value is None:
        return NO_VALUE
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} {_TIMES} 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def size(value: float | None) -> str:
    """Bytes in decimal units: `1.24 GB`."""
    if value is None:
        return NO_VALUE
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{_three_digits(value / limit)} {unit}"
    return f"{value:.0f} B"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return NO_VALUE
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def score(value: float | None, *, percent: bool) -> str:
    """A benchmark's value: `93.1%`, or three decimals."""
    if value is None:
        return NO_VALUE
    return (f"{100 * value:.1f}%" if percent else f"{value:.3f}").replace("-", MINUS)


def signed(value: float | None, *, percent: bool) -> str:
    """A change with its sign: `+12.4` percentage points, or `-0.310`."""
    if value is None:
        return NO_VALUE
    text = f"{100 * value:+.1f}" if percent else f"{value:+.3f}"
    return text.replace("-", MINUS)


def error(value: float, *, percent: bool) -> str:
    """A standard error in the same unit as its value, without the sign."""
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"


def p_value(value: float | None) -> str:
    """`= 0.012`, and below a thousandth `< 0.001`."""
    if value is None:
        return NO_VALUE
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def plain(value: Any) -> str:
    """A value of a certificate in a few characters: a number, a string or a boolean."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", MINUS) if 1e-3 <= abs(value) < 1e6 or value == 0 else power(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", MINUS)
    return NO_VALUE if value is None else str(value)
