"""Torch code that rooms share."""
