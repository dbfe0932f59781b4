"""Learning-rate schedules, one function each, selected by the key `schedule`.

A schedule returns the factor of the peak learning rate, from 0 to 1, for the step about to be taken, counted from 0.
All rise linearly to 1 at the last of `warmup_steps`.
"""

import math

from pretrain.training.settings import Settings


def wsd(step: int, settings: Settings) -> float:
    """Warmup, stable, decay (Hägele et al. 2024, arXiv 2405.18392, with the 1-sqrt decay of section 3).

    Constant after the warmup; decays over the last `decay_steps` as `1 - (1 - min) sqrt(done)`, where `done` goes from
    0 to 1 at `max_steps`.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if (into := step - (settings.max_steps - settings.decay_steps)) > 0:
        return 1.0 - (1.0 - settings.min_learning_rate_ratio) * math.sqrt(into / settings.decay_steps)
    return 1.0


def cosine(step: int, settings: Settings) -> float:
    """Cosine decay without restarts (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5).

    Decays after the warmup as `min + (1 - min) (1 + cos(pi done)) / 2`, where `done` goes from 0 to 1 at `max_steps`.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / (settings.max_steps - settings.warmup_steps)
    least = settings.min_learning_rate_ratio
    return least + (1.0 - least) * (1.0 + math.cos(math.pi * done)) / 2
