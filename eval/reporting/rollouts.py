"""Completions that a model was trained on while it sampled them: some of its first, middle and last steps."""

from typing import Any

from cordee.errors import Fault
from eval.reporting.records import Record
from eval.reporting.sections import cut

FILE = "completions.jsonl"
STEPS, SHOWN = 4, 3
"""Steps of a training that are shown, and completions of each: the worst, one of the middle, the best."""


def completions(records: list[Record]) -> list[dict[str, Any]]:
    """Of each training that kept its completions, those of some steps, and how it has collapsed if it has.

    Raises:
        Fault: a line holds something else.
    """
    return [_of(record) for record in records if record.holds(FILE)]


def _of(record: Record) -> dict[str, Any]:
    by_step: dict[int, list[dict[str, Any]]] = {}
    count = 0
    for number, row in enumerate(record.rows(FILE), 1):
        if not isinstance(row.get("step"), int) or not isinstance(row.get("rewards"), dict):
            raise Fault(f"line {number} is no completion", file=record.path / FILE)
        if not row.get("heldout"):
            by_step.setdefault(row["step"], []).append(row)
            count += 1
    steps = sorted(by_step)
    chosen = sorted({steps[round(at * (len(steps) - 1) / (STEPS - 1))] for at in range(STEPS)}) if steps else []
    return {
        "artifact": record.name,
        "stage": record.manifest.stage,
        "rows": count,
        "collapse": str(record.manifest.metrics.get("collapse") or ""),
        "steps": [{"step": step, "shown": [_shown(row) for row in _spread(by_step[step])]} for step in chosen],
    }


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst of a step's completions, one of the middle, and the best."""
    ordered = sorted(rows, key=lambda row: (row.get("reward") is not None, row.get("reward") or 0.0))
    places = sorted({round(at * (len(ordered) - 1) / (SHOWN - 1)) for at in range(SHOWN)})
    return [ordered[place] for place in places]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": cut(_text(row.get("prompt"), last_only=True)),
        "completion": cut(_text(row.get("completion"))),
        "rewards": row["rewards"],
        "reward": row.get("reward"),
    }


def _text(said: Any, *, last_only: bool = False) -> str:
    """Messages as text, each behind its role where there are several."""
    if not isinstance(said, list):
        return str(said or "")
    messages = [message for message in said if isinstance(message, dict)]
    if last_only or len(messages) == 1:
        return str(messages[-1].get("content") or "") if messages else ""
    return "\n".join(
        f"{message.get('role')}: {message.get('content') or message.get('tool_calls')}" for message in messages
    )
