"""Seeds that derive from a recipe's seed: the same whatever was drawn before, and in whichever process."""

import numpy as np


def seed_of(*key: int) -> int:
    """A seed below 2^63 for a key of whole numbers from 0: the recipe's seed, then what is drawn."""
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return int(state) >> 1
