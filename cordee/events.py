"""The events of a stage, `events.jsonl`: its processes append them, the command line shows them.

Each line is a JSON object with `event` (a name of `_FIELDS`) and `time` (seconds since
1970).
"""

import datetime as dt
import json
import time
from pathlib import Path
from typing import Any

from cordee import files
from cordee.errors import CordeeError, Fault, Stopped, UserError
from cordee.shown import hidden

_FIELDS: dict[str, dict[str, Any]] = {
    "start": {"time": int | float},
    "waits": {"time": int | float, "text": str},
    "note": {"time": int | float, "text": str},
    "resumed": {"time": int | float, "step": int, "text": str},
    "saved": {"time": int | float, "step": int, "blocked_s": int | float, "seconds": int | float},
    "progress": {"time": int | float, "done": int | float, "total": int | float, "unit": str, "figures": dict},
    "error": {"time": int | float, "exit_code": int, "text": str},
    "incident": {"time": int | float, "kind": str, "step": int, "text": str},
    "ended": {
        "time": int | float,
        "cause": str,
        "step": int,
        "taken": int,
        "silent_s": int | float,
        "spent": dict,
        "text": str,
    },
}


def append(path: Path, event: str, **fields: Any) -> None:
    """Append one event; its texts without tokens, keys and passwords."""
    said = {name: hidden(value) if isinstance(value, str) else value for name, value in fields.items()}
    append_row(path, {"event": event, "time": time.time(), **said})


def append_row(path: Path, *rows: dict[str, Any]) -> None:
    """Append JSON lines in one write: a reader sees all of them or none."""
    with path.open("ab", buffering=0) as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def append_error(path: Path, error: CordeeError) -> None:
    """Append the error that ended a stage, with its parts."""
    append(path, "error", text=str(error), **parts_of(error))


def parts_of(error: CordeeError) -> dict[str, Any]:
    """What `error_of` makes the error of again, as JSON."""
    parts = {"problem": error.problem, "file": error.file and str(error.file), "key": error.key, "hint": error.hint}
    return {"exit_code": error.exit_code, **parts}


def error_of(event: dict[str, Any]) -> CordeeError:
    """The error whose parts these are."""
    kinds = {kind.exit_code: kind for kind in (UserError, Fault, Stopped)}
    kind = kinds.get(event["exit_code"], Fault)
    return kind(event["problem"], file=event["file"], key=event["key"], hint=event["hint"])


def read(path: Path) -> list[dict[str, Any]]:
    """All events that can be read."""
    return [row for row in files.read_json_lines(path) if _is_event(row)]


def lines(path: Path) -> list[str]:
    """What the events tell, without progress: `2026-11-27 21:45:31  ended: killed: …`, a line each, in local time."""
    found = []
    for event in read(path):
        what = {"start": "starts", "ended": f"ended: {event.get('cause')}"}.get(event["event"], "")
        text = ": ".join(part for part in (what, event.get("text", "")) if part)
        if text:
            at = dt.datetime.fromtimestamp(event["time"]).astimezone()
            found.append(f"{at:%Y-%m-%d %H:%M:%S}  {' '.join(text.split())}")
    return found


def _is_event(row: dict[str, Any]) -> bool:
    """Whether a line is an event, with its fields: a damaged one must not end `status`."""
    fields = _FIELDS.get(str(row.get("event")))
    if fields is None or not all(isinstance(row.get(name), kind) for name, kind in fields.items()):
        return False
    return all(isinstance(value, int | float) for value in row.get("figures", {}).values())


def worked_s(path: Path) -> float:
    """The seconds that all attempts took, each up to its last event, the last one until now."""
    total, start, last = 0.0, None, 0.0
    for event in read(path):
        if event["event"] == "start":
            total += last - start if start is not None else 0.0
            start = event["time"]
        last = event["time"]
    return total + (time.time() - start if start is not None else 0.0)


class Tail:
    """Reads the events that are appended to a file from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size if path.exists() else 0
        self.seen: list[dict[str, Any]] = []
        """What was read so far, without progress."""

    def read(self) -> list[dict[str, Any]]:
        """The events that are new."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        rows = [json.loads(line) for line in whole.splitlines()]
        self.seen += [row for row in rows if row["event"] != "progress"]
        return rows
