"""The command line."""

from cordee.commands import recipes, running, start, use
from cordee.commands.common import app

__all__ = ["app", "recipes", "running", "start", "use"]


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
