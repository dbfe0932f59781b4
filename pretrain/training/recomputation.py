"""Activation checkpointing: the backward pass computes part of a layer again instead of keeping it.

`full` keeps the input of each layer (Chen et al. 2016, arXiv 1604.06174); `selective` also keeps what products of
matrices and attention give, which costs the most time to compute again (Korthikanti et al. 2022, arXiv 2205.05198,
section 5, the other way round: there attention is what is computed again).
"""

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from cordee.errors import UserError

OPERATIONS = (
    *("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    "_scaled_dot_product_attention_math",
)
"""The operations of torch whose results `selective` keeps."""


def recompute(model: PreTrainedModel, mode: Literal["none", "selective", "full"]) -> None:
    """Have the backward pass of each layer compute again what `mode` does not keep.

    Raises:
        UserError: transformers can't do that with this model.
    """
    if mode == "none":
        return
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        kept = [getattr(torch.ops.aten, name).default for name in OPERATIONS]
        kwargs["context_fn"] = functools.partial(create_selective_checkpoint_contexts, kept)
    try:
        model.gradient_checkpointing_enable(kwargs)
    except ValueError as error:
        raise UserError(f"transformers can't: {error}", key="activation_checkpointing", hint="say none") from error
