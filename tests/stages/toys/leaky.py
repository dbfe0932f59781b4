"""Tells what stands in its environment, as libraries do when a request is refused."""

import os
import sys
from typing import Any

from cordee import worker
from cordee.config import Config as Base
from cordee.files import write_json
from cordee.stage import Context


class Config(Base):
    """How it ends."""

    fails: bool = True
    """Whether by an error."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Note it, and fail with it, or write which of the hub's variables there are."""
    key = os.environ.get("LEAKY_API_KEY", "")
    context.note(f"signs in with {key}")
    context.waits(f"https://me:{key}@host")
    if config.fails:
        raise ValueError(f"401 for https://me:{key}@host/x: {key}")
    write_json(context.out / "seen.json", {"hub": "HF_TOKEN" in os.environ, "asks": sys.stdin.read()})
    return {}


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
