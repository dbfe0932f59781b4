"""Rewards of answers: plain functions, reward models and judges, combined by weight, and what is made of them.

`settings` is how a recipe names them; `opening` opens and calls them, by the convention of TRL's reward functions
(`prompts, completions, **columns -> list[float | None]`); `functions` are those that can be verified. `answers` reads
rows of answers, `summary` counts what they were given, and `choosing` makes preference pairs of them.
"""
