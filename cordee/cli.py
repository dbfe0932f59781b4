"""The command line."""

from cordee.commands import recipes, start, use
from cordee.commands.common import app

__all__ = ["app", "recipes", "start", "use"]


def main() -> None:
    """The entry point."""
    app()
