"""The memory of a training with TRL on one device, from what the recipe says of it."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cordee import files, memory, model_folder
from cordee.cost import Cost
from cordee.memory import Decoder, Memory, Training

if TYPE_CHECKING:
    from posttrain.training.settings import TrlConfig

QUANTIZED_BLOCK = 64
"""Weights that share a constant in bitsandbytes (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
CONSTANT, DOUBLE = 4 / QUANTIZED_BLOCK, 1 / QUANTIZED_BLOCK + 4 / (QUANTIZED_BLOCK * 256)
"""Bytes of these constants a weight; where they are quantized themselves, in blocks of 256."""
RANK = 8
"""PEFT's default of `r`."""


def of(config: "TrlConfig", decoder: Decoder, sequences: int = 1, *, logit_bytes: float | None = None) -> Memory:
    """The memory of a stage's training on one device.

    Args:
        config: the stage's config.
        decoder: the sizes of its model.
        sequences: how many are in a row, each of at most `max_length` tokens.
        logit_bytes: as in `Training`.
    """
    given, devices = config.trainer, config.launch.devices()
    stored = stored_bytes(config)
    adapted = None if not config.trains_adapter else _adapted(config, decoder)
    trained = None
    if adapted is not None:
        trained = sum(rank * (rows + columns) for rank, (rows, columns) in adapted) + _tables(config, decoder)
    return memory.of_training(
        decoder,
        Training(
            tokens=float(config.per_device_train_batch_size * sequences * config.longest),
            stored=stored,
            in_matrices=quantized_bytes(config.quantization),
            computed=min(memory.BYTES[config.computes_in], stored),
            adapter=None if adapted is None else tuple((rank, columns) for rank, (_, columns) in adapted),
            trained=trained,
            optim=str(given.get("optim", "adamw_torch")),
            recomputes="full" if given.get("gradient_checkpointing") or devices.checkpoints else "none",
            devices=devices.count,
            sharded=devices.sharded,
            reshards=devices.reshards,
            logit_bytes=logit_bytes,
            is_gpu=devices.are_gpus,
        ),
    )


def with_frozen(cost: Cost, frozen: float | None) -> Cost:
    """A training's cost with so many bytes of weights on each device that are only read; unknown where they are."""
    if cost.memory is None or frozen is None:
        return replace(cost, memory=None, memory_bytes=None)
    needed = replace(cost.memory, frozen=frozen)
    return replace(cost, memory=needed, memory_bytes=needed.total)


def stored_bytes(config: "TrlConfig") -> int:
    """Bytes of a weight as the model is opened."""
    dtype = (config.trainer.get("model_init_kwargs") or {}).get("dtype", "float32")
    return memory.BYTES.get(dtype, 2)  # `auto`: as makers store them


def quantized_bytes(settings: Mapping[str, Any] | None) -> float | None:
    """Bytes of a weight that bitsandbytes quantizes, with its share of constants; None where none are."""
    if settings and settings.get("load_in_4bit"):
        return 0.5 + (DOUBLE if settings.get("bnb_4bit_use_double_quant") else CONSTANT)
    return 1.0 if settings and settings.get("load_in_8bit") else None


def _adapted(config: "TrlConfig", decoder: Decoder) -> list[tuple[int, tuple[int, int]]]:
    """Rank and shape of each matrix that the adapter changes, as PEFT takes `target_modules`."""
    told = config.lora
    if told is None:
        file = config.model / model_folder.ADAPTER_CONFIG
        told = files.read_json(file) if file.is_file() else {}
    wanted, rank = told.get("target_modules") or "all-linear", int(told.get("r") or RANK)

    def is_wanted(name: str) -> bool:
        if isinstance(wanted, str):
            return wanted == "all-linear" or re.fullmatch(wanted, name) is not None
        return any(name == one or name.endswith(f".{one}") for one in wanted)

    return [(rank, shape) for name, shape in decoder.matrices.items() if is_wanted(name)]


def _tables(config: "TrlConfig", decoder: Decoder) -> int:
    """Parameters of the embedding and the head where the adapter holds them whole."""
    saved = (config.lora or {}).get("modules_to_save") or []
    return decoder.head * len({"embed_tokens", "lm_head"}.intersection(saved))
