"""The only exceptions that a user sees: one line, never a stack trace.

A *user error* is a mistake in what was asked for (exit code 2). A *fault* is something that went wrong
while doing it (exit code 1). A *stop* is a run that was asked to end and can go on (exit code 130).
"""

import difflib
import errno
from collections.abc import Iterable


class CordeeError(Exception):
    """Base of the three; `str()` is the one line that is printed, `exit_code` what the process returns."""

    exit_code = 1

    def __init__(self, problem: str, *, file: object = None, key: str | None = None, hint: str = "") -> None:
        place = ": ".join(str(part) for part in (file, key) if part)
        line = f"{place}: {problem}" if place else problem
        super().__init__(" ".join(f"{line}; {hint}".split()) if hint else " ".join(line.split()))


class UserError(CordeeError):
    """What was asked for is wrong: names the file, the key, what is wrong and the nearest right name."""

    exit_code = 2


class Fault(CordeeError):  # noqa: N818 - the design's word
    """What was asked for is right, and doing it failed: says what happened and what to do."""

    exit_code = 1


class Stopped(CordeeError):  # noqa: N818 - no error, but an end
    """The run was asked to stop, saved its state, and goes on with the next `run`."""

    exit_code = 130


def from_system(error: OSError, file: object = None) -> Fault:
    """The fault that an error of the operating system is: names the file, and what to do about a full disk."""
    where = error.filename or file
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Fault("no space left on the disk", file=where, hint="free some, then run again")
    return Fault(error.strerror or str(error), file=where)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names what `name` was probably meant to be, or else everything it could be."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if len(names) <= 40 else ""
