"""Losses of preference methods as pure functions: tensors in, a loss of each row out; each key's value is its name."""
