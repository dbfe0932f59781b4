"""Stages from an open corpus to a base checkpoint."""
