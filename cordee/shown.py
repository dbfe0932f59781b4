"""What may be shown and stored: no tokens, keys or passwords, and no signs that could steer a terminal."""

import os
import re
from collections.abc import Iterator

HIDDEN = "***"
_CREDENTIAL = re.compile(
    r"(?<=://)[^/?#\s@]+(?=@)"  # in a URL, before its host
    r"|\b(?:hf_|api_org_)[A-Za-z0-9]{20,}"  # the hub
    r"|\bsk-[\w-]{20,}"  # OpenAI, Anthropic
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\bxox[abps]-[\w-]{10,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"  # a JSON web token
    r"|(?<=-----BEGIN )[A-Z ]*PRIVATE KEY(?=-----)"
)
_VARIABLE = re.compile(r"(?:.*_)?(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE)", re.IGNORECASE)
"""Names of variables in the environment that hold such things."""
_VALUE = re.compile(r"(?=.*\d)(?!.*://)[^\s/~.]\S{11,}")
"""What their values look like; others, such as the path or the address of a key, are no secrets."""


def credential(text: str) -> bool:
    """Whether a text holds what looks like a token, a key or a password, or one that stands in the environment."""
    return bool(_CREDENTIAL.search(text)) or any(value in text for value in _environment())


def hidden(text: str) -> str:
    """A text with `***` in the place of such things."""
    for value in _environment():
        text = text.replace(value, HIDDEN)
    return _CREDENTIAL.sub(HIDDEN, text)


def plain(text: str) -> str:
    """A text without the signs by which it could steer a terminal or turn its lines around."""
    return "".join(sign for sign in text if sign in "\n\t\u200c\u200d" or sign.isprintable())


def _environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if _VARIABLE.fullmatch(name) and _VALUE.fullmatch(value):
            yield value
