"""Rows of a file in tokens, without a stage: for tests that look at single sequences."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cordee.chat import pairs as token_pairs
from cordee.chat.conversations import Conversation, Encoder
from cordee.chat.pairs import TokenPair
from cordee.chat.problems import Notes, Problems
from cordee.chat.selection import files_of, selected
from cordee.chat.source import Limits, Rules, Source


def chats(
    file: Path, tokenizer: Any, limits: Limits, note: Callable[[str], None] = print, **given: Any
) -> list[Conversation]:
    """The chats of a file; `given` are fields of `Source` and of `Rules`."""
    encoder, rows, problems, notes = _opened(file, tokenizer, limits, given)
    found = encoder.conversations(rows, problems, notes)
    problems.raise_any(file, len(rows))
    for line in notes.lines():
        note(line)
    return found


def pairs(
    file: Path, tokenizer: Any, limits: Limits, note: Callable[[str], None] = print, **given: Any
) -> list[TokenPair]:
    """The preference pairs of a file."""
    encoder, rows, problems, notes = _opened(file, tokenizer, limits, given)
    found = token_pairs.encode(rows, encoder, problems, notes)
    problems.raise_any(file, len(rows))
    for line in notes.lines():
        note(line)
    return found


def _opened(file: Path, tokenizer: Any, limits: Limits, given: dict[str, Any]) -> Any:
    rules = {name: given.pop(name) for name in ("bad_rows", "overlong", "earlier_answers") if name in given}
    source = Source.model_validate({"path": str(file), **{k: _plain(v) for k, v in given.items()}})
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a Template
    encoder = Encoder.of(tokenizer, source, Rules(limits, **rules))
    rows = [row for batch in selected(source, files_of(source).documents, 0) for row in batch]
    return encoder, rows, Problems(), Notes()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Collection) and not isinstance(value, str | dict) else value
