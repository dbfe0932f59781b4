"""Losses of pretraining, one function each, selected by the key `loss`.

A loss returns what each label costs and whether it counts. The loop divides the sum by the number of labels that count
in the global batch, over all processes and accumulation steps. Held-out text is always measured by plain cross-entropy.

Shapes: B rows, S tokens of a row, V tokens of the vocabulary.
"""

from typing import NamedTuple

import torch

from pretrain.data.loader import IGNORED
from pretrain.training.settings import Settings

PRIME, ROOT = 2**31 - 1, 742_938_285
"""Goldfish's hash is a number below the prime; the root's powers are spread over all of them. Products fit 64 bits."""


class Labels(NamedTuple):
    """A batch's labels and what the model says of them."""

    nats: torch.Tensor
    """`[B, S]`, float32: cross-entropy of each label; 0 where there is none."""
    logits: torch.Tensor
    """`[B, S, V]`, float32."""
    input_ids: torch.Tensor
    """`[B, S]`: the token before each label."""
    position_ids: torch.Tensor
    """`[B, S]`: the place of that token in its document, from 0."""
    labels: torch.Tensor
    """`[B, S]`: the token to predict; `IGNORED` where there is none."""


Loss = tuple[torch.Tensor, torch.Tensor]
"""What each label costs, `[B, S]` with a gradient, and whether it counts, `[B, S]` bool."""


def cross_entropy(given: Labels, settings: Settings) -> Loss:
    """The negative log-probability of every label, which all count."""
    del settings
    return given.nats, given.labels != IGNORED


def goldfish(given: Labels, settings: Settings) -> Loss:
    """Cross-entropy without one label in `goldfish_k`, against verbatim memorization (Hans et al. 2024).

    Equation 1 of arXiv 2406.10209, L = -1/|G| Σ G_i log P(x_i | x_<i), with the hashed mask of its section 3.1: label i
    does not count (G_i = 0) where a hash of the `goldfish_h` tokens before it falls into the lowest 1/k of its range.
    A passage thus misses the same labels wherever it is repeated. The first h labels of a document, and the one that
    ends it, always count.

    The hash is Σ r^j x_{i-j} mod p: unlike the product of ids in the authors' code it depends on the tokens' order, and
    one id that is 0 does not decide it.
    """
    hashes = torch.zeros_like(given.input_ids)
    for back in reversed(range(settings.goldfish_h)):
        hashes = (hashes + given.input_ids.roll(back, dims=1)) * ROOT % PRIME
    has_context = given.position_ids >= settings.goldfish_h - 1
    is_last = given.labels.roll(-1, dims=1) == IGNORED  # no row's last column has a label
    is_dropped = has_context & ~is_last & (hashes < PRIME // settings.goldfish_k)
    counts = (given.labels != IGNORED) & ~is_dropped
    return torch.where(counts, given.nats, 0.0), counts
