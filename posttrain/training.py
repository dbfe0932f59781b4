"""The skeleton of every stage that trains with TRL.

A stage gives `build(config, context) -> (trainer, meter)`; `fit` does the rest: it resumes from the newest resume
point, trains, reports progress, publishes intermediate checkpoints, and saves the model or the adapter.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import datasets
import pyarrow as pa
import torch
import transformers
import trl.trainer.utils
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from cordee import files
from cordee.compute import device
from cordee.compute import model as compute
from cordee.compute.tokenizer import open_tokenizer
from cordee.cost import training_flops
from cordee.errors import Fault, UserError
from cordee.stage import Context
from posttrain import adapters
from posttrain.compiling import compile_trainer, is_compiled
from posttrain.settings import TrlConfig, passes
from posttrain.watch import Watch, newest_resume_point

DATA = "data.json"
Arguments = TypeVar("Arguments", bound=transformers.TrainingArguments)
Config = TypeVar("Config", bound=TrlConfig)


@dataclass(frozen=True)
class Meter:
    """What a stage's batches count for, and what its metrics say of the data."""

    count: Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]]
    """From a batch as the collator made it to its number of `tokens` without padding, and what else is counted."""
    rows: int
    """Rows of the data: chats, or preference pairs."""
    tokens: int
    """Tokens of one pass over the data."""
    sequence_length: int
    """Tokens in a sequence, for the FLOPs of attention."""
    has_reference: bool = False
    """Whether a frozen reference model reads each token as well."""
    varying_shapes: bool = True
    """Whether batches have different shapes, which takes longer to compile."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Further metrics of the stage."""


def arguments(kind: type[Arguments], config: TrlConfig, context: Context, **ours: Any) -> Arguments:
    """The library's own config: its defaults, the recipe's `trainer:`, and what the stage sets itself.

    Args:
        kind: `SFTConfig`, `DPOConfig`, …
        config: the stage's config; it holds `trainer`.
        context: where to write, and the seed.
        ours: further fields that the stage sets, over the recipe's.

    Raises:
        UserError: the library refuses a value, or `accelerate launch` was told what is the stage's own.
        Fault: other processes run than were asked for.
    """
    _set_up_libraries(config)
    device.require_own_precision(config.launch)
    given: dict[str, Any] = dict(config.trainer)
    given.pop("model_init_kwargs", None)
    at_once = config.per_device_train_batch_size * config.launch.num_processes
    settings = {
        "gradient_checkpointing": False,
        "ddp_find_unused_parameters": False,  # a search through the graph each step
        **given,
        "output_dir": str(context.out / "resume"),
        "seed": context.seed,
        "data_seed": context.seed,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.global_batch_size // at_once,
        "logging_steps": 1,  # `Watch` thins them out; a mean over steps would change with a resume in their middle
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.resume_steps,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true",
        **ours,
    }
    try:
        made = kind(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind.__name__} refuses it: {error}", key="trainer") from error
    device.require_launched(config.launch, made.world_size, made.device)
    if made.device.type == "cpu":  # of several processes it is "cpu:0", which torch.load does not know: no resume
        made.__dict__["_setup_devices"] = torch.device("cpu")
    return cast("Arguments", made)


def _set_up_libraries(config: TrlConfig) -> None:
    """Same bits twice; no progress bars beside our own; on a CPU, too, only positions with loss go through the LM head.

    TRL leaves the masked positions out only where Triton runs, since their number changes from batch to batch and a
    compiled head would be compiled again. Here the head is never compiled (`posttrain.compiling`).
    """
    device.set_determinism(deterministic=config.deterministic)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not hasattr(trl.trainer.utils, "_use_triton"):
        raise Fault("this TRL has another fused LM head", hint="use the versions that requirements.txt pins")
    trl.trainer.utils._use_triton = lambda device: device.type in ("cpu", "cuda", "xpu")  # noqa: SLF001 - the only handle


def open_model(config: TrlConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in float32 unless `trainer: {model_init_kwargs: {dtype: …}}` says otherwise, and its tokenizer.

    Raises:
        UserError: the folder holds no model, or no tokenizer with a padding token.
        Fault: it is damaged.
    """
    options = {"dtype": "float32", **(config.trainer.get("model_init_kwargs") or {})}
    dtype = options.pop("dtype")
    model = compute.open_model(
        config.model, dtype=None if dtype == "auto" else getattr(torch, dtype), key="model", **options
    )
    tokenizer = open_tokenizer(config.model, key="model")
    if tokenizer.pad_token_id is None:
        raise UserError("its tokenizer has no padding token", file=config.model, key="model")
    return model, tokenizer


def open_trainer(
    kind: type[Trainer], config: TrlConfig, model: PreTrainedModel, settings: Any, **given: Any
) -> Trainer:
    """TRL's trainer, of an adapter where the config has `lora`.

    Args:
        kind: `SFTTrainer`, `DPOTrainer`, …
        config: the stage's config.
        model: the model to start from.
        settings: what `arguments` returned.
        given: further arguments of the trainer: `train_dataset`, `processing_class`.

    Raises:
        UserError: TRL or PEFT refuses a setting.
    """
    lora = adapters.lora_config(config.lora, model) if config.lora is not None else None
    try:
        return kind(model=model, args=settings, peft_config=lora, **given)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise UserError(f"TRL refuses it: {error}", key="trainer" if lora is None else "trainer, lora") from error


def fit(build: Callable[[Config, Context], tuple[Trainer, Meter]], config: Config, context: Context) -> dict[str, Any]:
    """Train to the end, from the newest resume point if there is one, and write the model or the adapter.

    `training.json` is written when everything else is whole: a run that was killed between its end and the artifact's
    publishing does not train again.

    Args:
        build: opens model and data, checks them, and returns the trainer and its meter.
        config: the stage's config.
        context: where to write, the seed, and where progress is reported.

    Returns:
        The manifest's metrics: what TRL logged last, `steps`, `tokens`, `flops`, `parameters`, …

    Raises:
        Stopped: a stop was asked for; the state is saved.
        UserError: the data, the model or a key is wrong.
        Fault: the loss is no number, or several processes run with the model left unwrapped.
    """
    finished = context.out / "training.json"
    if not finished.exists():
        metrics = _train(*build(config, context), config, context)
        if context.is_main:
            files.write_json(finished, metrics)
        PartialState().wait_for_everyone()
    if context.is_main:
        shutil.rmtree(context.out / "resume", ignore_errors=True)
    return cast("dict[str, Any]", files.read_json(finished))


def _train(trainer: Trainer, meter: Meter, config: TrlConfig, context: Context) -> dict[str, Any]:
    """Take the steps that are left, publish, and say what was trained."""
    trainable = trainable_parameters(trainer.model)
    for remark in compute.remarks(config.model):
        context.note(remark)
    context.note(f"{meter.rows} rows; {trainable:,} parameters to train")
    point = newest_resume_point(context.out / "resume")
    _require_same_data(trainer, context, is_resumed=point is not None)
    context.rewind(point.step if point else 0)
    if point:
        context.resumed(point.step)

    def begin(steps: int) -> None:
        tokens = meter.tokens * steps * config.global_batch_size / len(trainer.train_dataset)
        work = _flops(trainer, meter, config, tokens)
        compile_trainer(trainer, config, context, work, varying_shapes=meter.varying_shapes)

    watch = Watch(trainer, config, context, begin, lambda folder: publish(trainer, config, folder))
    if point:
        watch.totals.update(point.totals)
    take_step = trainer.training_step

    def counted(model: torch.nn.Module, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        watch.count(meter.count(inputs))
        return cast("torch.Tensor", take_step(model, inputs, *rest))

    trainer.training_step = counted
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=str(point.folder) if point else None)
    if watch.stopping:
        context.stop(f"step {trainer.state.global_step} of {trainer.state.max_steps}")
    publish(trainer, config, context.out)
    return _metrics(trainer, meter, config, watch) | {"trainable_parameters": trainable}


def _require_same_data(trainer: Trainer, context: Context, *, is_resumed: bool) -> None:
    """See that a resumed training has the token ids that it began with, whose digest lies beside the resume points.

    Raises:
        Fault: it has others, as where a chat template writes the date.
    """
    file, digest = context.out / "resume" / DATA, hashlib.sha256()
    for rows in trainer.train_dataset.with_format("arrow").iter(batch_size=1000):
        for name in sorted(rows.column_names):
            column = rows.column(name).combine_chunks()
            if pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type):
                parts = (column.value_lengths(), column.flatten())
                digest.update(name.encode() + b"".join(part.to_numpy().tobytes() for part in parts))
    found = digest.hexdigest()
    if is_resumed and files.read_json(file) != found:
        raise Fault(
            "the data has other token ids than when this training began: does the chat template write the date?",
            file=file,
            hint="set the date by chat_template_kwargs, or delete the folder of resume points to begin again",
        )
    if not is_resumed and context.is_main:
        files.write_json(file, found)


def trainable_parameters(model: torch.nn.Module) -> int:
    """Parameters that are trained.

    Raises:
        UserError: there are none.
    """
    count: int = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    if not count:
        raise UserError("there is nothing to train", key="lora")
    return count


def publish(trainer: Trainer, config: TrlConfig, folder: Path) -> None:
    """Write the adapter, or the whole model, with the tokenizer of its base; every process has to call this."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathered from all shards
    weights = {name.replace("_orig_mod.", ""): value for name, value in state.items()}  # as torch.compile names them
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(model, PeftModel):
            adapters.save(model, folder, base=config.model, state_dict=weights)
        else:
            compute.save_model(model, folder, tokenizer=config.model, chats=True, state_dict=weights)
    trainer.accelerator.wait_for_everyone()


def _metrics(trainer: Trainer, meter: Meter, config: TrlConfig, watch: Watch) -> dict[str, Any]:
    """What the manifest says of a training that has ended."""
    state, model = trainer.state, trainer.accelerator.unwrap_model(trainer.model)
    last: dict[str, float] = next((row for row in reversed(state.log_history) if "loss" in row), {})
    return {
        **{name: float(value) for name, value in last.items() if name not in ("step", "num_tokens")},
        **watch.totals,
        "steps": state.global_step,
        "rows": meter.rows,
        "flops": _flops(trainer, meter, config, watch.totals["tokens"]),
        "parameters": _parameters(model),
        "vocab_size": model.config.get_text_config().vocab_size,
        "num_processes": trainer.accelerator.num_processes,
        "compiled": is_compiled(trainer),
        **meter.metrics,
    }


def _flops(trainer: Trainer, meter: Meter, config: TrlConfig, tokens: float) -> float:
    """FLOPs to train on so many tokens."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    shape = model.config.get_text_config()
    work = training_flops(_parameters(model), tokens, shape.num_hidden_layers, shape.hidden_size, meter.sequence_length)
    return passes(config, has_reference=meter.has_reference) * work


def _parameters(model: torch.nn.Module) -> int:
    return sum(weights.numel() for weights in model.parameters())
