"""The loss on rows that are held out, measured on the way as the trainer computes it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import Trainer


def measure(
    trainer: Trainer, weigh: Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]] | None
) -> dict[str, float]:
    """The mean loss on the rows of `eval_dataset`, and the means of what TRL measures beside it, named `heldout_…`.

    Each batch counts by what its figures are means over, so the result does not depend on how rows are batched. Every
    process measures all rows, in the same order. The model runs in evaluation mode, eagerly: a compiled one would be
    compiled once more. An auxiliary loss of experts is left out: it is no loss of these rows.

    Args:
        trainer: that of TRL.
        weigh: from a batch to the number of what its `loss` is a mean over (tokens with loss, or pairs), and so of
            other figures; those that it leaves out are means over the same as the loss. None: the trainer makes the
            means itself.
    """
    rows, size, model = trainer.eval_dataset, trainer.args.per_device_train_batch_size, trainer.model
    has_auxiliary, trainer.aux_loss_enabled = trainer.aux_loss_enabled, False
    was_training = model.training
    model.eval()
    batches = (
        trainer.data_collator([rows[at] for at in range(start, min(start + size, len(rows)))])
        for start in range(0, len(rows), size)
    )
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        means = trainer.measure_heldout(batches) if weigh is None else _weighted(trainer, batches, weigh)
    model.train(was_training)
    trainer.aux_loss_enabled = has_auxiliary
    return {f"heldout_{name}": value for name, value in means.items()}


def _weighted(
    trainer: Trainer,
    batches: Iterable[Mapping[str, Any]],
    weigh: Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]],
) -> dict[str, float]:
    """The means of what TRL's trainer measures of each batch."""
    losses, weights = [], list[Mapping[str, torch.Tensor]]()
    for batch in batches:
        inputs: dict[str, Any] = trainer._prepare_inputs(batch)  # noqa: SLF001 - as its own evaluation does
        with trainer.compute_loss_context_manager():
            losses.append(float(trainer.compute_loss(trainer.model, inputs)))
        weights.append(weigh(inputs))
    beside = dict(trainer._metrics["eval"])  # noqa: SLF001 - a list of means, one of each batch
    trainer._metrics["eval"].clear()  # noqa: SLF001
    found = {"loss": losses} | {name: values for name, values in beside.items() if len(values) == len(losses)}
    means = {}
    for name, values in found.items():
        if name != "num_tokens":
            over = [float(weight.get(name, weight["loss"])) for weight in weights]
            weighted = sum(value * weight for value, weight in zip(values, over, strict=True))
            means[name] = weighted / max(sum(over), 1.0)
    return means
