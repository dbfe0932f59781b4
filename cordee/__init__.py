"""The core that the packages share: from a recipe to published artifacts. Imports no torch, except in `compute/`."""

__version__ = "0.1.0"
