"""Learning-rate schedules: pure functions from a step to a factor of the peak."""

import math


def warmup_stable_decay(
    step: int, max_steps: int, warmup_steps: int, decay_steps: int, min_learning_rate_ratio: float
) -> float:
    """Warm-up, stable, decay (Hägele et al. 2024, arXiv 2405.18392, with the 1-sqrt decay of section 3).

    Rises in a line to 1 at the last of `warmup_steps`, stays, and falls over the last `decay_steps` as
    `1 - (1 - min) sqrt(done)`, where `done` goes from 0 to 1 at `max_steps`.

    Args:
        step: the step about to be taken, from 0.
        max_steps: steps of the whole training.
        warmup_steps: steps of the rise.
        decay_steps: steps of the fall.
        min_learning_rate_ratio: where the fall ends, as a share of the peak.

    Returns:
        A factor from 0 to 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if (into := step - (max_steps - decay_steps)) > 0:
        return 1.0 - (1.0 - min_learning_rate_ratio) * math.sqrt(into / decay_steps)
    return 1.0
