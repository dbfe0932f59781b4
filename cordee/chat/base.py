"""The chat template of models that are pretrained here, and the tokens that it writes."""

from pathlib import Path

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
ROLES = ("system", "user", "assistant")
TURN_TOKENS = tuple(f"<|{role}_{end}|>" for role in ROLES for end in ("start", "end"))
