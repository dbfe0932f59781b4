"""The shapes that rows come in, told by their columns: chats, texts and preference pairs in the forms that people have.

Of several that a row has, the first in `CHATS` counts: many data sets hold `text`, rendered by somebody, beside
`messages`.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cordee.chat import turns
from cordee.chat.problems import BadRowError, Problems
from cordee.chat.source import Of, Source
from cordee.data.row import COMMA, Broken, Row
from cordee.errors import UserError, nearest

CHATS = {
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Shape → the columns that tell it."""
PAIRS = ("chosen", "rejected")
COLUMNS = {*(name for names in CHATS.values() for name in names), *PAIRS, "input", "history", "system"}
"""The columns that are trained on, in any shape."""
NAME_PROMPT = "`columns: {yours: prompt}` names its column"
TWICE = "{} begins with the prompt, which would then be there twice"
REPEATED_CHARACTERS = 20
"""From this length on a prompt with which an answer begins is one that stands there twice, and no "Hello"."""
SHOWN_COLUMNS = 12
Values = dict[str, Any]


@dataclass(frozen=True)
class Text:
    """A text of which the prompt carries no loss."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class TextPair:
    """A preference pair of texts: either answer follows the prompt as it stands."""

    prompt: str
    chosen: str
    rejected: str


def columns_of(row: Row, source: Source) -> Values:
    """A row's columns under the names that the source gives them, without those that are null or to be ignored.

    Raises:
        BadRowError: the row can't be read, a column to rename is not there, or its new name is taken.
    """
    values, columns = row.values, source.columns
    if isinstance(values, Broken):
        raise BadRowError(values.problem, hint="sed 's/,$//' takes them away" if values.problem == COMMA else "")
    for old, new in columns.items():
        if old not in values:
            problem = f"has no column {old!r}, which `columns` renames"
            raise BadRowError(problem, hint=nearest(old, values), kind=problem)
        if new in values and new not in columns:
            raise BadRowError(f"`columns` renames {old!r} to {new!r}, and there is such a column")
    kept = {name: value for name, value in values.items() if value is not None and name not in source.ignore}
    return {columns.get(name, name): value for name, value in kept.items()}


def shape(values: Mapping[str, Any]) -> str:
    """The name of a row's shape: one of `CHATS`, `preference pair`, `prompt`, or "" where none is known."""
    for name, needed in CHATS.items():
        if all(column in values for column in needed):
            return name
    if all(column in values for column in PAIRS):
        return "preference pair"
    return "prompt" if "prompt" in values else ""


def chat(values: Values, *, as_text: bool) -> Values | Text:
    """A row as one with `messages`, or as a text.

    Args:
        values: the row.
        as_text: whether strings are joined as they stand, and not made turns.

    Raises:
        BadRowError: it has no shape of a chat or a text.
    """
    found, rest = shape(values), dict(values)
    if found == "messages":
        messages = turns.messages(rest.pop("messages"), "messages")
    elif found == "ShareGPT":
        messages = turns.messages(rest.pop("conversations"), "conversations")
    elif found == "Alpaca":
        messages = turns.alpaca(rest)
    elif found == "prompt and completion":
        _require_good(rest)
        prompt, completion = rest.pop("prompt"), rest.pop("completion")
        if _is_repeated(prompt, completion):
            hint = "take it out, or `columns: {completion: text}` with `ignore: [prompt]` trains on the whole"
            raise BadRowError(TWICE.format("completion"), hint=hint)
        if as_text and isinstance(prompt, str) and isinstance(completion, str):
            return Text(prompt, completion)
        before, said = turns.side(prompt, "user", "prompt"), turns.side(completion, "assistant", "completion")
        if said[: len(before)] == before:
            raise BadRowError(TWICE.format("completion"), hint="`columns: {completion: messages}`, or take it out")
        messages = [*map(_without_loss, before), *said]
    elif found == "text":
        if not isinstance(rest["text"], str) or not rest["text"].strip():
            raise BadRowError("text is empty" if isinstance(rest["text"], str) else "text is no text")
        return Text("", rest["text"])
    else:
        raise _unknown(values, found)
    return rest | {"messages": _with_system(rest, messages)}


def question(values: Values) -> tuple[Values, Any]:
    """A row as one with the `messages` that are asked, and the answer that stands beside them, or None.

    A row has `prompt`, and `answer` where there is one, whatever else it has; or it is a chat, which is asked up to its
    last answer.

    Raises:
        BadRowError: it is neither, or holds what would not be asked.
    """
    if "prompt" not in values or shape(values) in ("prompt and completion", "Alpaca"):
        shaped = chat(values, as_text=False)
        if isinstance(shaped, Text):
            raise BadRowError("is a text, and a question is needed", hint=NAME_PROMPT)
        messages = shaped["messages"]
        if not isinstance(messages, list) or not turns.begins(messages[-1:], "assistant"):
            return shaped, values.get("answer")
        return shaped | {"messages": messages[:-1]}, messages[-1].get("content")
    if values.get("input"):
        hint = "Alpaca's columns are read as they are, without `columns`"
        raise BadRowError("has `input` beside the prompt, which would not be asked", hint=hint)
    rest = dict(values)
    asked = turns.side(rest.pop("prompt"), "user", "prompt")
    return rest | {"messages": _with_system(rest, asked)}, values.get("answer")


def pair(values: Values, *, as_text: bool) -> Values | TextPair:
    """A row as one with `prompt`, `chosen` and `rejected` as lists of messages, or as a pair of texts.

    Raises:
        BadRowError: it has no shape of a preference pair.
    """
    if not all(column in values for column in PAIRS):
        raise _unknown(values, shape(values), "pair")
    rest = dict(values)
    prompt, chosen, rejected = rest.pop("prompt", None), rest.pop("chosen"), rest.pop("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and not turns.is_chat(chosen):
        if prompt is None:
            return _split(chosen, rejected)
        if _is_repeated(prompt, chosen) and _is_repeated(prompt, rejected):
            hint = "take it out, or `ignore: [prompt]` takes what chosen and rejected share"
            raise BadRowError(TWICE.format("chosen"), hint=hint)
        if as_text and isinstance(prompt, str):
            return TextPair(prompt, chosen, rejected)
    sides = [turns.side(side, "assistant", name) for side, name in ((chosen, "chosen"), (rejected, "rejected"))]
    if prompt is None or (
        isinstance(prompt, str) and not any(side and turns.begins(side, "assistant") for side in sides)
    ):
        before = _common(*sides)
        _require_prompt(before, prompt)
        sides = [side[len(before) :] for side in sides]
    else:
        before = turns.side(prompt, "user", "prompt")
    before = _with_system(rest, before)
    return rest | {"prompt": before, "chosen": sides[0], "rejected": sides[1]}


def answer(values: Values, *, as_text: bool) -> Values | Text:
    """A row as one with `prompt` and `completion` as lists of messages, or as a text; a chat is its last answer.

    Raises:
        BadRowError: it has no shape of a prompt with an answer.
    """
    found, rest = shape(values), dict(values)
    if found in ("messages", "ShareGPT"):
        column = "messages" if found == "messages" else "conversations"
        messages = _with_system(rest, turns.messages(rest.pop(column), column))
        if not isinstance(messages, list) or not turns.begins(messages[-1:], "assistant"):
            raise BadRowError("does not end with an answer of the assistant")
        return rest | {"prompt": messages[:-1], "completion": messages[-1:]}
    if found != "prompt and completion":
        raise _unknown(values, found, "answer")
    prompt, completion = rest.pop("prompt"), rest.pop("completion")
    if _is_repeated(prompt, completion):
        raise BadRowError(TWICE.format("completion"), hint="take it out")
    if as_text and isinstance(prompt, str) and isinstance(completion, str):
        return Text(prompt, completion)
    before = _with_system(rest, turns.side(prompt, "user", "prompt"))
    return rest | {"prompt": before, "completion": turns.side(completion, "assistant", "completion")}


def require_known(rows: Sequence[Row], source: Source, of: Of) -> None:
    """See that the first rows of a source have a shape that is known, without a model.

    Raises:
        UserError: none of them has.
    """
    if not rows:
        raise UserError("holds no rows", file=source.path)
    problems = Problems()
    for row in rows:
        with problems.of(row.file, row.number, row.values):
            values = columns_of(row, source)
            if of == "prompts":
                question(values)
                continue
            is_pair = of == "pairs" or (of != "chats" and all(column in values for column in PAIRS))
            (pair if is_pair else chat if of == "chats" else answer)(values, as_text=source.as_text)
    if problems.count == len(rows):
        problems.raise_any(source.path, len(rows))


def _unknown(values: Mapping[str, Any], found: str, wanted: Literal["chat", "pair", "answer"] = "chat") -> BadRowError:
    """Why a row can't be read: what it is instead, or which columns it has."""
    if wanted == "pair" and found in CHATS:
        return BadRowError(f"is no preference pair but {found}", hint="a pair has `chosen` and `rejected`")
    if wanted == "answer" and found:
        return BadRowError(f"is no prompt with an answer but {found}", hint="an answer has `prompt` and `completion`")
    if found == "preference pair":
        hint = "posttrain.dpo trains on pairs; `columns: {chosen: completion}` trains on the chosen answers"
        return BadRowError("is a preference pair, and this stage trains on chats", hint=hint)
    of_wanted: dict[str, Sequence[Sequence[str]]] = {
        "chat": list(CHATS.values()),
        "pair": [PAIRS],
        "answer": [CHATS["prompt and completion"], CHATS["messages"], PAIRS],
    }
    shapes = of_wanted[wanted]
    known = [", ".join(names) for names in shapes]
    columns = ", ".join(map(repr, list(values)[:SHOWN_COLUMNS])) or "none"
    columns += f" and {len(values) - SHOWN_COLUMNS} more" if len(values) > SHOWN_COLUMNS else ""
    names = {name for names in shapes for name in names} | ({"prompt"} if wanted == "pair" else set())
    alike = {
        given: name
        for name in sorted(names.difference(values))
        for given in difflib.get_close_matches(name, [*map(str, values)], n=1, cutoff=0.8)
    }
    renames = ", ".join(f"{given}: {name}" for given, name in alike.items()) or "yours: prompt, …"
    hint = f"known are {'; '.join(known)}; `columns: {{{renames}}}` renames"
    told = "can't be told what it is"
    return BadRowError(f"{told}: its columns are {columns}", hint=hint, kind=told)


def _with_system(rest: Values, messages: Any) -> Any:
    """The messages after the column `system`, which is taken out of the row, where it says something.

    Raises:
        BadRowError: they begin with another one.
    """
    system = rest.pop("system", None) if isinstance(rest.get("system"), str) else None
    if not system or not system.strip() or not isinstance(messages, list):
        return messages
    if turns.begins(messages, "system"):
        if messages[0].get("content") != system:
            raise BadRowError("column 'system' is not what the messages begin with", hint="`ignore: [system]`")
        return messages
    return [{"role": "system", "content": system}, *messages]


def _require_good(values: Values) -> None:
    """Refuse a completion that is labelled as bad; in a CSV file the label is a text."""
    if str(values.get("label")).lower() in ("false", "0", "0.0"):
        hint = "leave these rows out, or `ignore: [label]` trains on them"
        raise BadRowError("is a completion that is labelled false", hint=hint)


def _require_prompt(before: list[Any], prompt: str | None) -> None:
    """See that a pair's answers share a beginning, and that it ends with the prompt where there is one."""
    if not before:
        raise BadRowError("chosen and rejected begin with different turns, and there is no `prompt`", hint=NAME_PROMPT)
    said = before[-1].get("content") if isinstance(before[-1], Mapping) else None
    if prompt is not None and (not isinstance(said, str) or said.strip() != prompt.strip()):
        raise BadRowError("prompt is not what chosen and rejected begin with", hint="`ignore: [prompt]`")


def _common(chosen: list[Any], rejected: list[Any]) -> list[Any]:
    """What both answers begin with, up to the last message that is not the assistant's."""
    count = next((at for at, two in enumerate(zip(chosen, rejected, strict=False)) if two[0] != two[1]), 0)
    count = count or (min(len(chosen), len(rejected)) if chosen[:1] == rejected[:1] else 0)
    while count and turns.begins(chosen[count - 1 :], "assistant"):
        count -= 1
    return chosen[:count]


def _split(chosen: str, rejected: str) -> TextPair:
    """Two texts as what they share, up to a blank, and their rests: as `trl.extract_prompt` does it."""
    shared = next((at for at, two in enumerate(zip(chosen, rejected, strict=False)) if two[0] != two[1]), None)
    if not shared:
        if shared == 0:
            raise BadRowError("chosen and rejected share no prompt", hint=NAME_PROMPT)
        raise BadRowError("chosen and rejected are equal, or one begins with the whole other")
    shared -= chosen[shared - 1] == " "
    return TextPair(chosen[:shared], chosen[shared:], rejected[shared:])


def _without_loss(message: Any) -> Any:
    """A message of a prompt, whose answers were given before."""
    is_answer = isinstance(message, Mapping) and message.get("role") == "assistant"
    return {**message, "train": False} if is_answer else message


def _is_repeated(prompt: Any, answer: Any) -> bool:
    """Whether a text begins with its whole prompt."""
    is_text = isinstance(prompt, str) and isinstance(answer, str)
    return is_text and len(prompt.strip()) >= REPEATED_CHARACTERS and answer.lstrip().startswith(prompt.strip())
