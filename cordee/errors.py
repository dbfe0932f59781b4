"""The only exceptions that a user sees: one line, never a stack trace.

A *user error* is a mistake in what was asked for (exit code 2). A *fault* is something that went wrong
while doing it (exit code 1). A *stop* is a run that was asked to end and can go on (exit code 130).
"""

import difflib
import errno
from collections.abc import Collection, Iterable
from typing import Self

from cordee.shown import hidden, plain


class CordeeError(Exception):
    """Base of the three: `str()` is the line that is printed, `exit_code` what the process returns.

    Args:
        problem: what is wrong.
        file: the file or folder that it is wrong in.
        key: the key in that file, or in the stage's config where no file is given.
        hint: what to write or do instead.
    """

    exit_code = 1

    def __init__(self, problem: str, *, file: object = None, key: str | None = None, hint: str = "") -> None:
        problem, hint = hidden(problem), hidden(hint)
        file = file if hidden(str(file)) == str(file) else hidden(str(file))
        self.problem, self.file, self.key, self.hint = problem, file, key, hint
        place = ": ".join(str(part) for part in (file, key) if part)
        line = f"{place}: {problem}" if place else problem
        super().__init__(plain(" ".join(f"{line}; {hint}".split()) if hint else " ".join(line.split())))

    def in_stage(self, file: object, key: str, fields: Collection[str]) -> Self:
        """This error with a recipe's file and a stage's key, `stages.sft` or empty, before it.

        Its own key is appended to the stage's if it is one of the stage's `fields`. If the error names a file of its
        own, or another key, they stand before the problem.
        """
        if self.file is None and self.key and self.key.partition(".")[0] in fields:
            return type(self)(self.problem, file=file, key=f"{key}.{self.key}".lstrip("."), hint=self.hint)
        problem = ": ".join(str(part) for part in (self.file, self.key, self.problem) if part)
        return type(self)(problem, file=file, key=key, hint=self.hint)


class UserError(CordeeError):
    """The request is wrong: names the file, the key, what is wrong and the nearest right name."""

    exit_code = 2


class Fault(CordeeError):  # noqa: N818 - the design's word
    """The request was right and could not be fulfilled: names what happened and what to do."""

    exit_code = 1


class Stopped(CordeeError):  # noqa: N818 - no error, but an end
    """The run was asked to stop and saved its state; the next `run` continues it."""

    exit_code = 130


def from_system(error: OSError, file: object = None) -> Fault:
    """An error of the operating system as a fault that names the file."""
    where = error.filename or file
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Fault("no space left on the disk", file=where, hint="free some, then run again")
    return Fault(error.strerror or str(error), file=where)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint with the most similar of the known names, or else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if len(names) <= 40 else ""
