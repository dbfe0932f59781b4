"""Chat templates that can be given by a name: ChatML, and those of the families in the installed TRL."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from cordee import peek
from cordee.config import Input
from cordee.errors import UserError, nearest


def templates() -> dict[str, Path]:
    """Name → file; TRL's are found without importing it."""
    found = {"chatml": Path(__file__).with_name("chatml.jinja")}
    if (source := peek.source_of("trl")) is not None:
        listed = sorted(source.with_name("chat_templates").glob("*.jinja"))
        found |= {path.stem: path for path in listed if not path.stem.endswith("_training")}
    return found


def _by_name(given: Any) -> Any:
    """The file of a template that is given by its name; anything else as it is."""
    if not isinstance(given, str) or given.startswith("$") or "/" in given or Path(given).is_file():
        return given
    known = templates()
    if given not in known:
        raise UserError(f"no file and no template {given!r}", key="chat_template", hint=nearest(given, known))
    return str(known[given])


ChatTemplate = Annotated[Input, BeforeValidator(_by_name)]
"""A Jinja file, or the name of a template."""
