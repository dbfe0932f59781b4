"""Rewards that can be verified: one function each, which the key `function` names.

By TRL's convention a function is given a batch by columns (`completions`, and what the rows hold, such as `answer`),
and gives each row a number, or None where it does not apply. What stands behind the `*` are the function's own
arguments, which a recipe writes beside its name. Completions are texts or messages.
"""

import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from cordee import machine, sandbox
from cordee.errors import UserError
from posttrain.rewards import languages, numbers
from posttrain.rewards.texts import code_of, plain, text_of

Values = list[float | None]
AT_ONCE = 4
"""Programs that are run at the same time."""
VERIFY_S = 5
"""Seconds that math-verify may take for one answer."""


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> Values:
    """1 where the completion is the row's `answer`, or one of several; case, further space and a full stop aside."""
    return [
        None if right is None else float(plain(text_of(said)) in {plain(str(one)) for one in _several(right)})
        for said, right in zip(completions, answer, strict=True)
    ]


def regex_match(completions: Sequence[Any], answer: Sequence[Any], *, pattern: str, **_: Any) -> Values:
    """1 where the last match of `pattern`, or its first group, is the row's `answer`; compared as by `exact_match`."""
    sought, values = re.compile(pattern), Values()
    for said, right in zip(completions, answer, strict=True):
        found = [match[min(1, sought.groups)] or "" for match in sought.finditer(text_of(said))]
        is_right = bool(found) and plain(found[-1]) in {plain(str(one)) for one in _several(right)}
        values.append(None if right is None else float(is_right))
    return values


def format_match(completions: Sequence[Any], *, pattern: str, **_: Any) -> Values:
    """1 where the whole completion has the form of `pattern`, in which a dot is a new line too."""
    form = re.compile(pattern, re.DOTALL)
    return [float(form.fullmatch(text_of(said)) is not None) for said in completions]


def number_match(completions: Sequence[Any], answer: Sequence[Any], *, tolerance: float = 0.0, **_: Any) -> Values:
    r"""1 where the number that the completion ends with is that of the row's `answer`; None where that has none.

    Read are decimals, fractions, LaTeX's, what is in `\boxed{}`, and what follows `####`; `tolerance` is the largest
    difference, as a share of the answer.
    """
    values = Values()
    for said, right in zip(completions, answer, strict=True):
        wanted = None if right is None else numbers.last_number(str(right))
        if wanted is None:
            values.append(None)
            continue
        found = numbers.last_number(text_of(said))
        values.append(float(found is not None and abs(found - wanted) <= abs(wanted) * tolerance))
    return values


def math_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> Values:
    """1 where math-verify finds the completion's expression equal to the row's `answer` (LaTeX, sets, intervals).

    Raises:
        UserError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        hint = "pip install math-verify; number_match compares numbers without it"
        raise UserError("math-verify is not installed", hint=hint) from error
    # it stops by a signal, which only the main thread is sent
    limit = VERIFY_S if threading.current_thread() is threading.main_thread() else None
    values = Values()
    for said, right in zip(completions, answer, strict=True):
        wanted = [] if right is None else parse(str(right), parsing_timeout=limit)
        found = parse(text_of(said), parsing_timeout=limit) if wanted else []
        values.append(float(verify(wanted, found, timeout_seconds=limit)) if wanted else None)
    return values


def language_match(completions: Sequence[Any], language: Sequence[Any], *, texts: Path, **_: Any) -> Values:
    """1 where the completion is in the row's `language`, as told by its letters; None where it has no letters.

    Args:
        completions: of the batch.
        language: the tag of each, such as `de`.
        texts: a data file with the columns `text` and `language`, from which each language is known: one that is
            missing there can't be told.

    Raises:
        UserError: a row's language is not in `texts`.
    """
    known = languages.known(texts)
    known.require({str(tag) for tag in language if tag is not None})
    values = Values()
    for said, wanted in zip(completions, language, strict=True):
        found = None if wanted is None else known.of(text_of(said))
        values.append(None if found is None else float(found == str(wanted)))
    return values


def length_between(
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
    tokens: Sequence[int] | None = None,
    *,
    least: int = 0,
    most: int | None = None,
    unit: Literal["words", "characters", "tokens"] = "words",
    **_: Any,
) -> Values:
    """1 where the completion has from `least` to `most` words, characters or tokens, both included.

    Raises:
        UserError: tokens are to be counted, and the rows do not tell them.
    """
    if unit == "tokens":
        if completion_ids is None and tokens is None and completions:
            hint = "count words or characters"
            raise UserError("the rows have no column `tokens`", key="unit", hint=hint)
        counts = list(map(len, completion_ids)) if completion_ids is not None else list(tokens or ())
    else:
        counts = [len(text.split() if unit == "words" else text) for text in map(text_of, completions)]
    return [float(least <= count and (most is None or count <= most)) for count in counts]


def passes_tests(completions: Sequence[Any], tests: Sequence[Any], *, seconds: float = 10.0, **_: Any) -> Values:
    """1 where the completion's last block of code (or all of it) passes the row's `tests`, which are run after it.

    Each program runs in the sandbox: without network, files to write or other processes, with 4 GiB of memory, and at
    most `seconds`.

    Raises:
        Fault: there is no sandbox on this machine.
    """
    sandbox.check()
    programs = [
        None if own is None else f"{code_of(text_of(said))}\n{own}"
        for said, own in zip(completions, tests, strict=True)
    ]
    with ThreadPoolExecutor(min(AT_ONCE, machine.cores())) as pool:
        outcomes = pool.map(lambda program: None if program is None else sandbox.run(program, seconds), programs)
        return [None if said is None else float(said == "passed") for said in outcomes]


def _several(answer: Any) -> Sequence[Any]:
    """The right answers of a row, which may have one."""
    return answer if isinstance(answer, list | tuple) else [answer]
