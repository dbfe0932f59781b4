"""Mixing data: what a row says, duplicates, questions of benchmarks, amounts, the data card."""
