"""Rows as they stand in data files, and the messages or the text that each holds.

Read by pyarrow, json, csv and datasets alone: no function of `cordee.chat` or `cordee.data` is used, so that a fault
there is seen by the proof of the masks.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

ROLES = {
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "bing", "bard", "claude", "gemini"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
}


def read(file: Path) -> dict[int, dict[str, Any]]:
    """A file's rows by their numbers, from 1: lines of JSON and of delimited text as an editor counts them."""
    name = file.name
    for ending in (".gz", ".zst", ".bz2"):
        name = name.removesuffix(ending)
    if name.endswith(".parquet"):
        return dict(enumerate(pq.read_table(file).to_pylist(), 1))
    if name.endswith(".arrow"):
        return dict(enumerate(Dataset.from_file(str(file)), 1))
    with pa.input_stream(str(file), compression="detect") as opened:
        text = opened.read().decode("utf-8-sig", errors="replace")
    if name.endswith((".csv", ".tsv")):
        return _delimited(text, "\t" if name.endswith(".tsv") else _delimiter(text))
    if name.endswith(".txt"):
        return _paragraphs(text)
    whole = _json(text)
    if isinstance(whole, dict):
        held = whole.get("data", next(iter(whole.values())) if len(whole) == 1 else None)
        is_rows = isinstance(held, list) and not any("role" in item or "from" in item for item in held)
        whole = held if is_rows else [whole]
    rows = dict(enumerate(whole, 1)) if isinstance(whole, list) else _objects(text)
    return {at: row for at, row in rows.items() if isinstance(row, dict)}


def shaped(row: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    """A row with `messages`, or with `text` and the `prompt` before it."""
    turns: list[Any]
    if "messages" in row or "conversations" in row:
        turns = _turns(row.get("messages", row.get("conversations")), "user")
    elif "instruction" in row and "output" in row:
        asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        pairs = [*(row.get("history") or []), (asked, row["output"])]
        turns = [
            {"role": role, "content": said}
            for two in pairs
            for role, said in zip(("user", "assistant"), two, strict=True)
        ]
    elif "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if as_text and isinstance(prompt, str) and isinstance(completion, str):
            return {"prompt": prompt, "text": completion}
        before = _turns(prompt, "user")
        turns = [message | {"train": False} if message["role"] == "assistant" else message for message in before]
        turns += _turns(completion, "assistant")
    else:
        return {"text": row["text"]}
    system = [{"role": "system", "content": row["system"]}] if (row.get("system") or "").strip() else []
    return row | {"messages": [*(system if turns[0]["role"] != "system" else []), *turns]}


def _turns(said: Any, role: str) -> list[dict[str, Any]]:
    """A column's messages; a text that is no JSON of messages is one of the role."""
    found = _json(said) if isinstance(said, str) else said
    if isinstance(found, dict):
        found = [found]
    if not isinstance(found, list) or not all(isinstance(turn, dict) and {"role", "from"} & {*turn} for turn in found):
        return [{"role": role, "content": said}]
    return [_message(turn) for turn in found]


def _paragraphs(text: str) -> dict[int, dict[str, Any]]:
    """What stands between blank lines, by the lines at which each begins."""
    found: dict[int, list[str]] = {}
    start = 0
    for at, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        start = (start or at) if line.strip() else 0
        if start:
            found.setdefault(start, []).append(line)
    return {at: {"text": "\n".join(lines)} for at, lines in found.items()}


def _objects(text: str) -> dict[int, Any]:
    """JSON objects by the lines at which they begin: one a line, or else of several lines, one behind the other."""
    lines = text.split("\n")
    if any(isinstance(_json(line), dict) for line in lines[:100]):
        return {at: _json(line) for at, line in enumerate(lines, 1)}
    found, at = {}, 0
    while at < len(text.rstrip()):
        at += len(text[at:]) - len(text[at:].lstrip())
        value, end = json.JSONDecoder().raw_decode(text, at)
        found[1 + text.count("\n", 0, at)] = value
        at = end
    return found


def _delimiter(text: str) -> str:
    """What parts the columns of a header."""
    header = text.partition("\n")[0]
    return next((one for one in ",;\t" if len(next(csv.reader([header], delimiter=one))) > 1), ",")


def _delimited(text: str, delimiter: str) -> dict[int, dict[str, Any]]:
    """Rows of CSV by the lines at which they begin."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns, found, start = next(lines), {}, lines.line_num + 1
    for values in lines:
        if values:
            found[start] = dict(zip(columns, values, strict=False))
        start = lines.line_num + 1
    return found


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _message(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of ShareGPT as a message."""
    if "role" in turn or "from" not in turn:
        return turn
    rest, said = {key: value for key, value in turn.items() if key not in ("from", "value")}, turn["from"].lower()
    if said in ("function_call", "tool_call"):
        calls = json.loads(turn["value"]) if isinstance(turn["value"], str) else turn["value"]
        calls = calls if isinstance(calls, list) else [calls]
        return rest | {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return rest | {"role": ROLES.get(said, said), "content": turn.get("value")}
