"""The rope: what holds the stages of a climb together. Imports no torch, except in `compute/`."""

__version__ = "0.1.0"
