"""How often a reward model prefers the chosen answer of pairs that are held out, and how well it knows how sure to be.

Its probability that it is right about a pair is sigmoid(|margin|), by the model of Bradley and Terry (1952). In each
bin of these probabilities, their mean is compared with the share of pairs that it is right about (Guo et al. 2017,
arXiv 1706.04599).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer

NAME = "calibration.json"
BINS = 10


def margins(trainer: Trainer) -> list[float]:
    """Of each pair of `eval_dataset` the reward of the chosen answer less that of the rejected one.

    Every process has to call this, and computes all of them, in evaluation mode and without compiling.
    """
    rows, size, model = trainer.eval_dataset, trainer.args.per_device_train_batch_size, trainer.model
    found: list[float] = []
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for start in range(0, len(rows), size):
            batch = trainer.data_collator([rows[at] for at in range(start, min(start + size, len(rows)))])
            inputs: dict[str, Any] = trainer._prepare_inputs(batch)  # noqa: SLF001 - as its own evaluation does
            with trainer.compute_loss_context_manager():
                logits = model(**inputs, use_cache=False).logits  # [2 · pairs, 1]
            chosen, rejected = logits[:, 0].double().chunk(2)
            found += (chosen - rejected).tolist()
    model.train(was_training)
    return found


def described(margins: Sequence[float]) -> dict[str, Any]:
    """Of so many margins, above 0 where the chosen answer is preferred: accuracy, bins and their mean error.

    `expected_calibration_error` is the mean of |confidence - accuracy| over the bins, weighted by their pairs (their
    equation 3); a margin of 0 is half right.
    """
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        is_right = 0.5 if margin == 0 else float(margin > 0)
        bins[min(int((confidence - 0.5) * 2 * BINS), BINS - 1)].append((confidence, is_right))
    means = [
        {
            "pairs": len(own),
            "confidence": sum(confidence for confidence, _ in own) / len(own),
            "accuracy": sum(is_right for _, is_right in own) / len(own),
        }
        for own in bins
        if own
    ]
    error = sum(one["pairs"] * abs(one["confidence"] - one["accuracy"]) for one in means) / len(margins)
    return {
        "pairs": len(margins),
        "accuracy": sum(margin > 0 for margin in margins) / len(margins),
        "margin_mean": sum(margins) / len(margins),
        "expected_calibration_error": error,
        "bins": means,
    }
