"""The texts of completions, which are texts or lists of messages, as TRL hands them to reward functions."""

import re
from typing import Any

_CODE = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def text_of(said: Any) -> str:
    """What a prompt or a completion says: the text itself, or the content of the last message."""
    if isinstance(said, str):
        return said
    content = said[-1].get("content") if said else None
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content or "")


def plain(text: str) -> str:
    """A text without what makes no difference: case, further space and a last full stop."""
    return " ".join(text.casefold().split()).rstrip(".。").strip()


def code_of(text: str) -> str:
    """The last block of code in a text, or the text itself where it has none."""
    blocks = _CODE.findall(text)
    return str(blocks[-1]) if blocks else text
