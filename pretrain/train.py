"""Pretrains a language model on tokens: packed documents, exact resume, held-out bits per byte.

    accelerate launch -m pretrain.train --config train.yaml

After a kill at any moment, the next run resumes from the last resume point and ends in the same weights, bit for bit.
"""

import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cordee import files, model_folder, worker, yaml12
from cordee.config import Config as BaseConfig
from cordee.config import Input
from cordee.cost import SHAPE, Cost, decoder_parameters, training_flops
from cordee.errors import UserError
from cordee.memory import BYTES, CROSS_ENTROPY_BYTES, Decoder, Training, apertus_shapes, of_training
from cordee.stage import Context
from pretrain.training.settings import Settings

VERSION = 3


class Source(BaseConfig):
    """An entry of `data`: tokens to train on."""

    tokens: Input
    """A tokens artifact: its `train.bin` and `heldout.bin`."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the rows, relative to the weights of the other sources."""


class Config(Settings):
    """The model and its data; the other keys are those of `pretrain.training.settings`."""

    model: Input
    """A YAML with the fields of a transformers config (Apertus unless `model_type` says otherwise), or a Hugging
    Face model folder to continue from."""
    data: list[Source] = Field(min_length=1)
    """Sources, all of one tokenizer; an epoch of a source holds each of its documents once."""
    long_documents: Literal["error", "split"] = "error"
    """What is done with a document longer than `sequence_length`: an error, or it is split into parts that do not
    attend to each other."""


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """Tokens, FLOPs, parameters and memory; padding is counted as tokens.

    Raises:
        UserError: the model's file is not YAML, or a field of its shape is not a number.
    """
    tokens = float(config.max_steps * config.global_batch_size * config.sequence_length)
    fields = _model_fields(config.model)
    vocab_size = fields.get("vocab_size") or given.get("data.0.tokens", Cost()).vocab_size
    if vocab_size is None and (described := config.data[0].tokens / "tokens.json").is_file():
        vocab_size = files.read_json(described)["vocab_size"]
    # fields that the YAML leaves out have transformers' defaults, which are not known here
    if not vocab_size or fields.get("model_type", "apertus") != "apertus" or any(name not in fields for name in SHAPE):
        return Cost(tokens=tokens, vocab_size=vocab_size)
    parameters = decoder_parameters(fields, vocab_size)
    layers, width = fields["num_hidden_layers"], fields["hidden_size"]
    told = {"hidden_act": "xielu", **fields, "vocab_size": vocab_size}
    decoder = Decoder.of(told, apertus_shapes(told), parameters)
    memory = of_training(decoder, _training(config)) if decoder else None
    return Cost(
        tokens=tokens,
        flops=training_flops(parameters, tokens, layers, width, config.sequence_length),
        parameters=parameters,
        memory_bytes=memory.total if memory else None,
        vocab_size=vocab_size,
        memory=memory,
        decoder=decoder,
    )


def _training(config: Config) -> Training:
    """What the memory of a training depends on: weights, gradients and moments are float32."""
    devices = config.launch.devices()
    return Training(
        tokens=config.per_device_train_batch_size * config.sequence_length,
        computed=BYTES[config.precision],
        optim=config.optimizer,
        recomputes="full" if devices.checkpoints else config.activation_checkpointing,
        devices=devices.count,
        sharded=devices.sharded,
        reshards=devices.reshards,
        logit_bytes=CROSS_ENTROPY_BYTES,
    )


def _model_fields(model: Path) -> dict[str, Any]:
    """The fields of a model's config; none where it does not exist yet."""
    if (model / "config.json").is_file():
        config: dict[str, Any] = files.read_json(model / "config.json")
        return {**config, **model_folder.language_config(config)}
    fields = yaml12.read(model, key="model") if model.is_file() else {}
    for name in ("vocab_size", *SHAPE):
        value = fields.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"must be a whole number of at least 1, not {value!r}", file=model, key=name)
    return fields


def run(config: Config, context: Context) -> dict[str, Any]:
    """Train to the end, from the newest resume point if there is one, and write the model.

    Raises:
        UserError: the data, model or batch do not fit each other.
        Fault: what runs differs from what was asked for, or the loss is not finite.
    """
    from cordee.compute import device
    from pretrain.training import assembly, checkpoint, loop

    finished = context.out / "training.json"  # written last: all other files are complete
    if not finished.exists():
        folders, weights = [source.tokens for source in config.data], [source.weight for source in config.data]
        data = assembly.Data(folders, weights, config.long_documents)
        training = assembly.assemble(config, context, config.model, data)
        with training.saver:
            state = assembly.restore(training)
            assembly.dry_run(training)
            loop.resume_measuring(training, state)
            loop.train(training, state)
            found = loop.measure_heldout(training, state)
            context.heart.enter("publish")
            checkpoint.save(training.objective.model, context, ".", training.tokenizer)
        metrics = assembly.metrics(training, state) | {"heldout_bits_per_byte": found["bits_per_byte"]}
        if context.is_main:
            files.write_json(context.out / "heldout.json", {**found, "precision": metrics["precision"]})
            files.write_json(finished, metrics)
        training.accelerator.wait_for_everyone()
        device.end(training.accelerator)
    if context.is_main:
        shutil.rmtree(context.out / "resume", ignore_errors=True)
    return dict(files.read_json(finished))


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
