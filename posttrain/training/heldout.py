"""The loss on rows that are held out, measured on the way as the trainer computes it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import Trainer


def measure(trainer: Trainer, weigh: Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """The mean loss on the rows of `eval_dataset`, and the means of what TRL measures beside it, named `heldout_…`.

    Each batch counts by what its figures are means over, so the result does not depend on how rows are batched. Every
    process measures all rows, in the same order. The model runs in evaluation mode, eagerly: a compiled one would be
    compiled once more. An auxiliary loss of experts is left out: it is no loss of these rows.

    Args:
        trainer: that of TRL.
        weigh: from a batch to the number of what its `loss` is a mean over (tokens with loss, or pairs), and so of
            other figures; those that it leaves out are means over the same as the loss.
    """
    rows, size, model = trainer.eval_dataset, trainer.args.per_device_train_batch_size, trainer.model
    has_auxiliary, trainer.aux_loss_enabled = trainer.aux_loss_enabled, False
    losses, weights = [], list[Mapping[str, torch.Tensor]]()
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for start in range(0, len(rows), size):
            batch = trainer.data_collator([rows[at] for at in range(start, min(start + size, len(rows)))])
            inputs: dict[str, Any] = trainer._prepare_inputs(batch)  # noqa: SLF001 - as its own evaluation does
            with trainer.compute_loss_context_manager():
                losses.append(float(trainer.compute_loss(model, inputs)))
            weights.append(weigh(inputs))
    model.train(was_training)
    trainer.aux_loss_enabled = has_auxiliary
    beside = dict(trainer._metrics["eval"])  # noqa: SLF001 - a list of means, one of each batch
    trainer._metrics["eval"].clear()  # noqa: SLF001
    found = {"loss": losses} | {name: values for name, values in beside.items() if len(values) == len(losses)}
    means = {}
    for name, values in found.items():
        if name != "num_tokens":
            over = [float(weight.get(name, weight["loss"])) for weight in weights]
            weighted = sum(value * weight for value, weight in zip(values, over, strict=True))
            means[f"heldout_{name}"] = weighted / max(sum(over), 1.0)
    return means
