"""Every stock template in TRL's package with chats of each kind: which tokens carry loss, by the maker's rendering.

The table in docs/chat_templates.md is what this prints:

    python tests/cordee/chat/stock_templates.py > docs/chat_templates.md
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "stock"))

from families import ADD, TEMPLATES, TOOL_TALK, source, talk, tokenizer

from cordee.chat import schema, spans
from cordee.chat.schema import BadRowError, Chat, Record
from cordee.chat.spans import Answer, Rendering
from cordee.chat.templates import Template, common_length

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
TEXTS = (
    "What is the capital of France?",
    "The capital is Paris.",
    "Et ça? Würde",
    "libres et égaux 你好",
    "Why?",
    "So.",
)
BRIEF = "Be very brief."
Found = list[tuple[Rendering, list[int], np.ndarray, list[Answer]]]


def thoughts(template: Template) -> str:
    """The key of an answer's reasoning: `reasoning_content`, unless the template reads another one."""
    return "thinking" if template.reads("thinking") and not template.reads("reasoning_content") else "reasoning_content"


def rows(template: Template) -> dict[str, dict[str, Any]]:
    """A row of each kind, by the name of its column."""
    reasoning = {thoughts(template): "I ponder."}
    three = talk(*TEXTS)
    return {
        "one turn": {"messages": talk(*TEXTS[:2])},
        "three turns": {"messages": three},
        "system": {"messages": [{"role": "system", "content": BRIEF}, *three]},
        "developer": {"messages": [{"role": "developer", "content": BRIEF}, *three]},
        "tool call": {"messages": TOOL_TALK, "tools": [ADD]},
        "reasoning": {"messages": talk(*TEXTS, **reasoning)},
    }


def answers(template: Template, row: dict[str, Any]) -> tuple[Chat, Found]:
    """A row as it is trained: its texts, and of each the ids `[seq]`, which carry loss `[seq]`, and the answers.

    Raises:
        BadRowError: it can't be.
    """
    chat = schema.chat(Record(Path(), 1, row), template)
    found = []
    for one in spans.render(chat, template):
        encoded = template.encode([one.text], return_offsets_mapping=True)
        (ids,), offsets = encoded["input_ids"], np.array(encoded["offset_mapping"][0])
        placed = spans.locate(one, ids, offsets, template)
        found.append((one, ids, spans.loss_mask(one, placed, offsets, None), placed))
    return chat, found


def faults(template: Template, chat: Chat, found: Found) -> list[str]:
    """What is wrong, judged by characters and by nothing but `apply_chat_template`.

    The ids are the maker's; an answer carries loss from the end of the prompt to its last special token, or to the one
    that begins another's turn; nothing else does; each answer that trains does so once.
    """
    said, carried = [], Counter()
    for one, ids, has_loss, placed in found:
        messages = chat.messages[: one.messages]
        theirs = template.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **chat.options)
        if theirs["input_ids"] != ids:
            said.append("other ids than the maker's")
        trained = [answer.message for answer in placed if answer.trains]
        carried.update(trained)
        areas = [area(template, chat, messages, place, one.text) for place in trained]
        offsets = template.encode([one.text], return_offsets_mapping=True)["offset_mapping"][0]
        for token, (start, end) in enumerate(offsets):
            text, is_special = one.text[start:end], ids[token] in template.special_ids
            piece = template.tokenizer.convert_ids_to_tokens(ids[token]).strip("▁ĠĊ \n")
            near = [first for first, _, is_exact in areas if not is_exact and first - 2 <= start <= first]
            if not text or (near and not piece):
                continue
            wanted = any((start >= first if is_special else end > first) and start < until for first, until, _ in areas)
            if wanted != has_loss[token]:
                said.append(f"{text!r} behind {one.text[max(start - 20, 0) : start]!r}")
    if carried != {place: 1 for place, trains in enumerate(chat.trains) if trains}:
        said.append(f"answers are trained {dict(carried)}")
    return said


def area(template: Template, chat: Chat, messages: list[Any], place: int, text: str) -> tuple[int, int, bool]:
    """Where an answer begins and ends in the whole text, and whether its prompt stands there as it is written alone.

    Where it does not, a blank at its end may be a token of its own, or part of one, in the prompt alone.
    """

    def rendered(messages: list[Any], **how: Any) -> str:
        return template.tokenizer.apply_chat_template(messages, tokenize=False, **chat.options, **how)

    def outside(length: int, other: str) -> int:
        inside = (token.start() for token in template.special.finditer(other) if token.start() < length < token.end())
        return next(inside, length)

    prompt, through = rendered(messages[:place], add_generation_prompt=True), rendered(messages[: place + 1])
    is_exact = text.startswith(prompt)
    first, end = outside(common_length(text, prompt), text), outside(common_length(text, through), through)
    special = list(template.special.finditer(text, first, end))
    if special and not text[special[-1].end() : end].strip():
        return first, special[-1].end(), is_exact
    follows = template.special.match(text, end)
    is_another = place + 1 < len(messages) and messages[place + 1]["role"] != "assistant"
    return first, follows.end() if follows and is_another else end, is_exact


APART = "earlier answers have a sequence of their own: the template renders them differently when messages follow"
OTHERWISE = "the prompt alone ends in other tokens than before its answer: loss begins at the first token that differs"
ENDLESS = "the template writes no end of turn after a chat's last answer"


def cell(template: Template, row: dict[str, Any]) -> tuple[str, list[str]]:
    """`✓` and what is to be known of it, or `✗` and why it can't be."""
    try:
        chat, found = answers(template, row)
    except BadRowError as error:
        where = f" ({error.shown_by})" if error.shown_by else ""
        return "✗", [f"{error.problem}{where}"]
    assert not faults(template, chat, found)
    trained = [answer for *_, placed in found for answer in placed if answer.trains]
    holds = {
        APART: len(found) > 1,
        OTHERWISE: any(answer.begins_differently for answer in trained),
        ENDLESS: any(answer.until == answer.end for answer in trained),
    }
    return "✓", [note for note, is_so in holds.items() if is_so]


def table() -> str:
    """The document."""
    notes: dict[str, int] = {}
    columns = list(rows(Template(tokenizer(source(NAMES[0])))))
    lines = [f"| template | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for name in NAMES:
        template = Template(tokenizer(source(name)))
        cells = [cell(template, row) for row in rows(template).values()]
        shown = [
            f"{mark} {', '.join(str(notes.setdefault(note, len(notes) + 1)) for note in told)}" for mark, told in cells
        ]
        lines.append(f"| `{name}` | {' | '.join(map(str.strip, shown))} |")
    return HEAD + "\n".join([*lines, "", *(f"{number}. {note}" for note, number in notes.items())]) + "\n"


HEAD = """# Chat templates: which tokens carry loss

<!-- written by: python tests/cordee/chat/stock_templates.py -->

The stock templates in TRL's package, with text alone, as their makers ship them. ✓: the token ids are those of
`apply_chat_template`, byte for byte; every answer and its end of turn carry loss, and nothing else does. ✗: the row is
refused, in the line below with that number.

Where the answers stand is found by rendering the chat up to each of them: an answer begins where the prompt ends that
the template writes when it asks for this answer, and ends with the special token behind it. No template here needs
another way. A template with `{% generation %}` marks, such as TRL's own training variants, is trained by its marks; a
stock template is never exchanged for such a variant, since those let the header of an answer carry loss too (`<think>`,
`<|start|>assistant`, the line break behind `assistant`), or write other bytes (Qwen3's, GLM's).

What a template does to a text is its maker's choice: Llama 3's and Gemma's trim what a message says, and so do GLM's
and Qwen 3.5's, which also move thoughts within an answer's text to where reasoning stands. Where a template takes
thoughts out of an answer that trains (DeepSeek R1's distilled models), the row is refused.

Llama 3.2's, gpt-oss's and Muse's templates write the day's date into each chat: the run says so.

Chats out of the ordinary: an answer without content is refused, and so is one of which the template writes nothing; a
chat may begin with the assistant, if it can be told where that answer begins, hold several answers in a row, or end
with the user. Parallel tool calls, several results, and calls with `content` null are rendered as the template has it,
or refused in one line where it leaves one out.

"""


if __name__ == "__main__":
    sys.stdout.write(table())
