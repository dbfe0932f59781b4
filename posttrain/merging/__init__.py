"""Merging beyond one adapter: several adapters by weight, averages of checkpoints."""
