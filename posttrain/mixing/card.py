"""The data card: what a mixture holds and what was left out, as JSON and as a page in Markdown."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cordee import units
from posttrain.mixing.amounts import Copies
from posttrain.mixing.decontamination import NGRAM, SHARE, SHORTEST, Questions
from posttrain.mixing.scan import Scanned

NOT_TOLD = "not told"


def card(
    sources: Sequence[Scanned],
    copies: Sequence[Copies],
    questions: Questions | None,
    asked: Mapping[str, Any],
    *,
    has_tokens: bool,
) -> dict[str, Any]:
    """The card as JSON.

    Args:
        sources: after the last pass, with all that was left out.
        copies: how often each row of each source stands in the mixture.
        questions: those of benchmarks.
        asked: the keys of the stage that decide about rows.
        has_tokens: whether tokens were counted.
    """
    told = [_source(one, count, has_tokens=has_tokens) for one, count in zip(sources, copies, strict=True)]
    rows, tokens = (sum(one[unit] or 0 for one in told) for unit in ("rows", "tokens"))
    for one in told:
        one["share"] = (one["tokens"] / max(tokens, 1)) if has_tokens else one["rows"] / max(rows, 1)
    return {
        "rows": rows,
        "tokens": tokens if has_tokens else None,
        "sources": told,
        **{of: _added(one[of] for one in told) for of in ("languages", "licences")},
        "decontamination": _decontamination(sources, questions) if questions else None,
        "settings": dict(asked),
    }


def _source(scanned: Scanned, copies: Copies, *, has_tokens: bool) -> dict[str, Any]:
    source, columns = scanned.source, scanned.columns
    return {
        "name": scanned.name,
        "path": str(source.path),
        "weight": source.weight,
        "max_rows": source.max_rows,
        "max_tokens": source.max_tokens,
        "rows_read": len(scanned),
        "rows_used": int((copies > 0).sum()),
        "rows": int(copies.sum()),
        "tokens": int((copies * columns["tokens"]).sum()) if has_tokens else None,
        "languages": _counts(columns["language"], copies, scanned.names),
        "licences": _counts(columns["licence"], copies, scanned.names),
        "left_out": [vars(one) for one in scanned.left_out.values()],
        "contaminated": dict(sorted(scanned.by_task.items())),
    }


def _counts(numbers: npt.NDArray[Any], copies: Copies, names: Sequence[str]) -> dict[str, int]:
    """Rows in the mixture by the name that a column numbers, the most frequent first."""
    counts = np.bincount(numbers, weights=copies, minlength=len(names)).astype(np.int64)
    found = {name or NOT_TOLD: int(count) for name, count in zip(names, counts, strict=True) if count}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _added(parts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _decontamination(sources: Sequence[Scanned], questions: Questions) -> dict[str, Any]:
    """What was looked for, and what was found, by task."""
    tasks = Counter(question.task for question in questions.questions)
    return {
        "ngram_tokens": NGRAM,
        "shortest_overlap_tokens": SHORTEST,
        "share": SHARE,
        "tasks": {
            task: {
                "questions": count,
                "too_short": questions.too_short[task],
                "rows_left_out": sum(one.by_task.get(task, 0) for one in sources),
            }
            for task, count in sorted(tasks.items())
        },
    }


def rows_file(told: Mapping[str, Any]) -> dict[str, Any]:
    """What the report shows of the mixture: the same shape as what a training has read."""
    return {
        "sources": [
            {
                "path": one["path"],
                "rows": one["rows_read"],
                "sequences": one["rows"],
                "tokens": one["tokens"],
                "left_out": one["left_out"],
            }
            for one in told["sources"]
        ]
    }


def page(told: Mapping[str, Any]) -> str:
    """The card in Markdown."""
    has_tokens = told["tokens"] is not None
    counted = f" and {units.count(told['tokens'])} tokens" if has_tokens else ""
    lines = [
        "# Data card",
        "",
        f"{told['rows']} rows{counted} of {len(told['sources'])} sources.",
        "",
        "## Sources",
        "",
    ]
    lines += _table(
        ["source", "weight", "rows read", "left out", "different rows", "rows", "tokens", "share"],
        [
            [one["name"], f"{one['weight']:g}", one["rows_read"], sum(kind["rows"] for kind in one["left_out"]),
             one["rows_used"], one["rows"], one["tokens"] if has_tokens else "not counted", f"{one['share']:.1%}"]
            for one in told["sources"]
        ],
    )  # fmt: skip
    for title, of in (("Languages", "languages"), ("Licences", "licences")):
        lines += ["", f"## {title}", "", *_table([of[:-1], "rows"], told[of].items())]
    if found := told["decontamination"]:
        lines += ["", "## Questions of benchmarks", "", _method(found), ""]
        names = ("questions", "too_short", "rows_left_out")
        rows = [[task, *(one[name] for name in names)] for task, one in found["tasks"].items()]
        lines += _table(["task", "questions", "too short to be found", "rows left out"], rows)
    lines += ["", "## Left out", ""]
    for one in told["sources"]:
        for kind in one["left_out"]:
            lines.append(f"- {one['name']}: {kind['rows']} rows: {kind['problem']}")
            lines += [f"  - {_example(row)}" for row in kind["first"]]
    settings = [[f"`{key}`", value] for key, value in told["settings"].items()]
    lines += ["", "## Settings", "", *_table(["key", "value"], settings)]
    return "\n".join(lines) + "\n"


def _method(found: Mapping[str, Any]) -> str:
    tokens, shortest, share = (found[key] for key in ("ngram_tokens", "shortest_overlap_tokens", "share"))
    return (
        f"A row is left out if {tokens} tokens in a row are those of a question, and overlaps of at least {shortest} "
        f"tokens make up more than {share:.0%} of it. Questions of fewer than {tokens} tokens can't be found."
    )


def _example(row: Mapping[str, Any]) -> str:
    by = f", {row['shown_by']}" if row["shown_by"] else ""
    return _plain(f"{row['file']}, row {row['row']}{by}: {row['text']}")


def _table(head: Sequence[str], rows: Any) -> list[str]:
    body = [f"| {' | '.join(_plain(str(cell)) for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *body]


def _plain(text: str) -> str:
    """A text that neither ends a cell nor a line."""
    return " ".join(text.replace("|", "\\|").split())
