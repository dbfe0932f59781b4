"""The second pass: the rows of the mixture are written, and those that are not are counted with examples."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cordee import files
from cordee.chat.formats import columns_of
from cordee.chat.problems import SHOWN
from cordee.stage import Context
from posttrain.mixing import duplicates
from posttrain.mixing.amounts import Copies
from posttrain.mixing.duplicates import Places
from posttrain.mixing.scan import KEPT, Scanned, again, shown

NOT_DRAWN = "is beyond its source's cap or part, or was not drawn"
EVERY = 10_000
"""Rows from one look for a stop to the next."""


def write(file: Path, sources: Sequence[Scanned], copies: Sequence[Copies], first: Places, context: Context) -> None:
    """Write the mixture as JSON lines, one source after the other; the file appears whole.

    A row has its columns, renamed as its source says, and `source`, the source's name; one that it had is kept as
    `own_source`.

    Args:
        file: what is written.
        sources: after duplicates were marked; what is left out here is added to each.
        copies: how often each row stands in the mixture.
        first: the row of all sources that each repeats.
        context: told of progress, and asked for a stop.

    Raises:
        Stopped: a stop was asked for.
    """
    starts = np.cumsum([0, *map(len, sources)])
    beside = file.with_name(f".{file.name}.tmp")
    with beside.open("w", encoding="utf-8") as opened:
        for scanned, count, start in zip(sources, copies, starts, strict=False):
            for at, row in again(scanned, context.seed):
                if at % EVERY == 0:
                    _tell(context, int(start) + at, int(starts[-1]))
                verdict = int(scanned.columns["verdict"][at])
                if problem := duplicates.SAID.get(verdict, "" if verdict != KEPT or count[at] else NOT_DRAWN):
                    seen = scanned.left_out.get(problem)
                    examples = []
                    if problem != NOT_DRAWN and (seen is None or len(seen.first) < SHOWN):
                        values = columns_of(row, scanned.source)
                        examples = [shown(row, values, duplicates.place(sources, int(first[start + at])))]
                    scanned.leave_out(problem, 1, examples)
                if count[at]:
                    opened.write(_line(columns_of(row, scanned.source), scanned.name) * int(count[at]))
        opened.flush()
        os.fsync(opened.fileno())
    beside.replace(file)
    files.sync_folder(file.parent)


def _tell(context: Context, done: int, total: int) -> None:
    if context.stop_requested():
        context.stop(f"row {done} of {total}, in the second pass")
    context.progress(done, total, "rows written")


def _line(values: dict[str, Any], name: str) -> str:
    row = {key: value for key, value in values.items() if key not in ("source", "own_source")}
    own = values.get("own_source", values.get("source"))
    told = {"source": name} if own is None else {"source": name, "own_source": own}
    return json.dumps(row | told, ensure_ascii=False, default=str) + "\n"
