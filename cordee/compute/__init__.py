"""Torch code that the packages share."""
