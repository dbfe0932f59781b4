"""Writes which places for compiled code it was told."""

import os
from typing import Any

from cordee import worker
from cordee.config import Config as Base
from cordee.files import write_json
from cordee.stage import Context

NAMES = ("CORDEE_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT")


class Config(Base):
    """It needs to be told nothing."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write them."""
    del config
    write_json(context.out / "caches.json", {name: os.environ.get(name) for name in NAMES})
    return {}


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
