"""Compiles the model of a TRL trainer where it pays, before its first step."""

import time
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import Trainer

from cordee.compute import device
from cordee.stage import Context
from posttrain.training.settings import TrlConfig

DYNAMIC_COSTS = 2.0
"""How much longer compiling takes for batches of varying shape, as a multiple of that for a single one."""


def compile_trainer(
    trainer: Trainer, config: TrlConfig, context: Context, flops: float, *, varying_shapes: bool
) -> bool:
    """Compile the trainer's decoder where a training of so many FLOPs pays for it.

    Only the decoder is compiled. TRL's LM head takes the positions with loss alone, and their number differs in each
    batch; a head for all positions made compiled SFT three times slower (docs/performance.md).

    Returns:
        Whether it is compiled.

    Raises:
        UserError: `compile: on` on a machine without a compiler.
        Fault: it can't be compiled, or a batch does not fit into memory.
    """
    flops /= DYNAMIC_COSTS if varying_shapes else 1.0
    compiled, why = device.resolve_compile(config.compile, flops, trainer.args.device)
    context.note(f"{'compiled' if compiled else 'not compiled'}: {why}")
    context.waits("the first step, which is compiled" if compiled else "the first step")
    if not compiled:
        return False
    began = time.perf_counter()
    device.compile_module(_decoder(trainer.model), dynamic=varying_shapes)
    with device.first_pass():
        _first_batch(trainer)
    context.note(f"compiled in {time.perf_counter() - began:.0f} s")
    return True


def is_compiled(trainer: Trainer) -> bool:
    """Whether the trainer's decoder runs compiled."""
    return _decoder(trainer.accelerator.unwrap_model(trainer.model))._compiled_call_impl is not None  # noqa: SLF001 - there is no public name


def _decoder(model: torch.nn.Module) -> torch.nn.Module:
    """A causal language model without its head, adapters included."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast("torch.nn.Module", causal.base_model)


def _first_batch(trainer: Trainer) -> None:
    """Run the first rows of the data forward and backward, and forget the gradients.

    Code for varying shapes depends on the first shape that it was made for. So that is not the batch at which a
    training begins or goes on, but always the same one: otherwise a resume would end in other bits.
    """
    rows = trainer.train_dataset
    batch = trainer.data_collator([rows[at % len(rows)] for at in range(trainer.args.per_device_train_batch_size)])
    inputs: dict[str, Any] = trainer._prepare_inputs(batch)  # noqa: SLF001 - as its own training step does
    with trainer.compute_loss_context_manager():
        loss: torch.Tensor = trainer.compute_loss(trainer.model_wrapped, inputs)
    trainer.accelerator.backward(loss)
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()  # noqa: SLF001 - TRL's means of the step to come
