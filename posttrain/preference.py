"""Preference alignment: DPO (Rafailov et al. 2023, arXiv 2305.18290) with TRL, as a LoRA adapter or of all weights.

    accelerate launch -m posttrain.preference --config FILE [key=value …]

With an adapter the reference is the model with the adapter off; without one it is the model as it was.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from cordee import worker
from cordee.config import Config as Keys
from cordee.config import Input, Library
from cordee.cost import Cost, training_flops
from cordee.stage import Context
from posttrain.settings import OWNED, TrlConfig, data_cost, training_cost

if TYPE_CHECKING:
    from trl import DPOTrainer


class Source(Keys):
    """One file of preference pairs."""

    path: Input
    """A .parquet or .jsonl file with `prompt`, `chosen` and `rejected`, each a list of messages."""


class Config(TrlConfig):
    """What is aligned, with which pairs, how."""

    data: list[Source] = Field(min_length=1)
    """The pairs to learn from; at least one file."""
    lora: Annotated[
        dict[str, Any] | None,
        Library(
            "peft.LoraConfig",
            owned=(
                *("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"),
                *("base_model_name_or_path", "revision", "runtime_config"),
            ),
        ),
    ] = None
    """PEFT's own settings of the adapter (`r`, `lora_alpha`, `target_modules`, …); none: all weights are trained."""
    trainer: Annotated[
        dict[str, Any],
        Library("trl.DPOConfig", owned=(*OWNED, "logging_first_step", "truncation_mode", "padding_free")),
    ] = Field(default_factory=dict)
    """TRL's own settings (`learning_rate`, `beta`, `loss_type`, `num_train_epochs`, `max_length` in tokens, …)."""


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """At most: each pair is two sequences of at most `max_length` tokens, read by the model and by the reference."""
    columns = ["prompt", "chosen", "rejected"]
    data = [data_cost(source.path, f"data.{place}.path", given, columns) for place, source in enumerate(config.data)]
    pairs = sum(part.rows or 0.0 for part in data)
    steps = config.trainer.get("max_steps", 0)
    seen = steps * config.global_batch_size if steps > 0 else pairs * config.trainer.get("num_train_epochs", 3)
    longest = config.trainer.get("max_length") or 1024
    in_pair = sum(part.tokens or 0.0 for part in data) / pairs if pairs else 0.0  # more than in either sequence of it
    tokens = 2.0 * seen * (min(in_pair, longest) or longest) if seen else None
    whole = training_cost(config, given, tokens, forwards=_passes(config))
    if config.lora is None or whole.memory_bytes is None or whole.parameters is None:
        return whole
    return replace(whole, memory_bytes=whole.memory_bytes - 12.0 * whole.parameters)  # no gradient, no moments


def _passes(config: Config) -> float:
    """Work per token, in units of one forward and backward through all weights (2 + 4 FLOPs a parameter).

    The reference adds one forward; with an adapter the frozen weights need no gradient of their own.
    """
    return 1.0 if config.lora is not None else 8 / 6


def run(config: Config, context: Context) -> dict[str, Any]:
    """Check the pairs, train or go on training, and write the adapter or the model; returns the manifest's metrics."""
    from posttrain import training

    return training.once(context, lambda: _train(config, context))


def _train(config: Config, context: Context) -> dict[str, Any]:
    from trl import DPOConfig

    from posttrain import adapters, dpo, pairs, reading, training
    from posttrain.rows import Stops

    settings = training.arguments(DPOConfig, config, context, logging_first_step=True)
    dpo.check_settings(settings, config.lora)
    model, tokenizer = training.open_model(config)
    rows = [row for source in config.data for row in reading.read(source.path, pairs.COLUMNS)]
    longest = model.config.max_position_embeddings
    stops = Stops.of(model, tokenizer)
    checked = pairs.tokenize(rows, tokenizer, stops, min(settings.max_length or longest, longest))
    lora = adapters.lora_config(config.lora, model) if config.lora is not None else None
    trainer = dpo.build(model, settings, dpo.dataset(rows, settings, context.out), tokenizer, lora)
    pairs.require_same(checked, trainer.train_dataset)
    trainable = dpo.trainable_parameters(trainer.model)
    context.note(f"{len(rows)} pairs; {trainable:,} parameters to train")

    per_epoch = sum(pair.tokens for pair in checked)
    figures = training.train(trainer, config, context, per_epoch)
    if config.lora is None:
        training.save(trainer, config, context)
    else:
        _save_adapter(trainer, config, context)
    tokens = dpo.trained_tokens(settings, per_epoch, len(rows), int(figures["steps"]))
    shape = model.config
    work = (shape.num_hidden_layers, shape.hidden_size, per_epoch // (2 * len(rows)))
    return {
        **figures,
        "tokens": tokens,
        "flops": _passes(config) * training_flops(figures["parameters"], tokens, *work),
        "trainable_parameters": trainable,
        "rows": len(rows),
        "vocab_size": shape.vocab_size,
    }


def _save_adapter(trainer: "DPOTrainer", config: Config, context: Context) -> None:
    """Write the adapter with its base's tokenizer."""
    from posttrain import adapters, training

    weights = training.gather_weights(trainer)
    if context.is_main:
        model = trainer.accelerator.unwrap_model(trainer.model)
        adapters.save(model, context.out, base=config.model, state_dict=weights)
    trainer.accelerator.wait_for_everyone()


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
