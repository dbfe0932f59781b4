"""The tokens that a chat template adds to the texts of a chat, estimated without transformers."""

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

UNKNOWN = (40, 10)
"""Of a template that does not render here: more than those of most have."""


def of(template: str, variables: Mapping[str, Any], count: Callable[[str], int]) -> tuple[int, int]:
    """The tokens that a template adds to each chat, and to each message.

    Args:
        template: its text.
        variables: what it may write, such as `bos_token`.
        count: gives the tokens of a text, special tokens known.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    pair = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    try:
        rendered = environment.from_string(template)
        once, twice = (count(rendered.render(messages=pair * turns, **variables)) for turns in (1, 2))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return UNKNOWN
    texts = 2 * count("x")
    each = max(0, twice - once - texts) // 2
    return max(0, once - texts - 2 * each), each
