"""The skeleton of every stage that trains with TRL.

A stage gives `build(config, context) -> (trainer, data)`; `fit` does the rest: it resumes from the newest resume
point, trains, reports progress, publishes intermediate checkpoints, and saves the model or the adapter.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import datasets
import torch
import transformers
import trl.trainer.utils
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from cordee import files, model_folder
from cordee.compute import device, resume
from cordee.compute import model as compute
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import Fault, UserError
from cordee.stage import Context
from posttrain.training import adapter_settings, adapter_sums, adapters, metrics, start
from posttrain.training.compiling import compile_trainer
from posttrain.training.metrics import TrainingData
from posttrain.training.order import require_same_data
from posttrain.training.points import Points
from posttrain.training.settings import TrlConfig
from posttrain.training.watch import Watch

Arguments = TypeVar("Arguments", bound=transformers.TrainingArguments)
Config = TypeVar("Config", bound=TrlConfig)


def arguments(
    kind: type[Arguments], config: TrlConfig, context: Context, defaults: Mapping[str, Any] | None = None
) -> Arguments:
    """The library's own config: its defaults, the recipe's `trainer:`, and what the stage sets itself.

    Args:
        kind: `SFTConfig`, `DPOConfig`, …
        config: the stage's config; it holds `trainer`.
        context: where to write, and the seed.
        defaults: of the stage, where they are not the library's.

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
        "ddp_find_unused_parameters": _has_other_parts(config),  # a search through the graph each step
        "ddp_broadcast_buffers": False,  # they are constants; each step would wait for the main process
        **(defaults or {}),
        **given,
        "bf16": bool(given.get("bf16")) or config.computes_in == "bfloat16",  # TRL takes None for true
        "output_dir": str(context.out / "resume"),
        "remove_unused_columns": False,  # a row is read from the disk when it is asked for
        "seed": context.seed,
        "data_seed": context.seed,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.global_batch_size // at_once,
        "logging_steps": 1,  # `Watch` thins them out; a mean over steps would change with a resume in their middle
        "logging_nan_inf_filter": False,
        "save_strategy": "no",  # `Watch` says when, and `Points` saves
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true",
    }
    try:
        made = kind(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind.__name__} refuses it: {error}", key="trainer") from error
    device.require_launched(config.launch, made.world_size, made.device)
    return cast("Arguments", made)


def _has_other_parts(config: TrlConfig) -> bool:
    """Whether a model has parts beside its language model, such as a vision tower, which text gives no gradient."""
    told = files.read_json(start.base_of(config) / "config.json")
    return model_folder.language_config(told) is not told


def _set_up_libraries(config: TrlConfig) -> None:
    """Same bits twice; no progress bars beside our own; on a CPU, too, only positions with loss go through the LM head.

    TRL leaves the masked positions out only where Triton runs, since their number changes from batch to batch and a
    compiled head would be compiled again. Here the head is never compiled (`posttrain.training.compiling`).
    """
    device.set_determinism(deterministic=config.deterministic)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not hasattr(trl.trainer.utils, "_use_triton"):
        raise Fault("this TRL has another fused LM head", hint="use the versions that requirements.txt pins")
    trl.trainer.utils._use_triton = lambda device: device.type in ("cpu", "cuda", "xpu")  # noqa: SLF001 - the only handle


def open_model(config: TrlConfig) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model, in float32 unless `trainer: {model_init_kwargs: {dtype: …}}` says otherwise, and its tokenizer.

    Where `model` is an adapter: its base with the adapter to train on, or merged into it for a new one.

    Raises:
        UserError: the folder holds no model, or a key does not fit it.
        Fault: it is damaged.
    """
    found = start.find(config)
    model: PreTrainedModel | PeftModel = start.open_base(config, found.base)
    tokenizer = open_tokenizer(found.tokenizer, key="model")
    if found.adapter:
        adapted = adapters.open_adapter(found.adapter, model, found.base, is_trainable=config.trains_adapter)
        model = adapters.merge(adapted) if config.adapter == "new" else adapted
    if new := start.new_tokens(config, tokenizer):
        if isinstance(model, PeftModel):
            raise UserError("the adapter has no weights for them", key="added_tokens", hint="write `adapter: new`")
        compute.grow_tables(model, max(new) + 1)
    # A row that stands for padding gets no gradient from torch; the same token may end a turn.
    model.get_input_embeddings().padding_idx = None
    return model, tokenizer


def open_trainer(
    kind: type[Trainer], config: TrlConfig, model: PreTrainedModel | PeftModel, settings: Any, **given: Any
) -> Trainer:
    """TRL's trainer, of an adapter where the config has `lora`.

    Args:
        kind: `TokenTrainer`, `PreferenceTrainer`, …
        config: the stage's config.
        model: what `open_model` returned.
        settings: what `arguments` returned.
        given: further arguments of the trainer: `train_dataset`, `processing_class`.

    Raises:
        UserError: TRL or PEFT refuses a setting.
    """
    lora = None
    if config.lora is not None:
        lora = adapter_settings.lora_config(config.lora, model, start.new_tokens(config, given["processing_class"]))
        if config.adapter == "new":
            adapter_sums.require_addable(adapter_sums.config_of(config.model, model), lora, config.model)
    try:
        trainer = kind(model=model, args=settings, peft_config=lora, **given)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise UserError(f"TRL refuses it: {error}", key="trainer" if lora is None else "trainer, lora") from error
    adapters.prepare(trainer.model)
    return trainer


def fit(
    build: Callable[[Config, Context], tuple[Trainer, TrainingData]],
    config: Config,
    context: Context,
    save: Callable[[Trainer, TrlConfig, Path], None] | None = None,
) -> dict[str, Any]:
    """Train to the end, from the newest resume point if there is one, and write the model or the adapter.

    `training.json` is written when everything else is whole: a run that was killed between its end and the artifact's
    publishing does not train again.

    Args:
        build: opens model and data, checks them, and returns the trainer and its data.
        config: the stage's config.
        context: where to write, the seed, and where progress is reported.
        save: writes what is published, called in every process; `publish` if not given.

    Returns:
        The manifest's metrics: what TRL logged last, `steps`, `tokens`, `flops`, `parameters`, …

    Raises:
        Stopped: a stop was asked for; the state is saved.
        UserError: the data, the model or a key is wrong.
        Fault: the loss is no number, or several processes run with the model left unwrapped.
    """
    finished = context.out / "training.json"
    if not finished.exists():
        context.heart.enter("data")
        found = _train(*build(config, context), config, context, save or publish)
        if context.is_main:
            files.write_json(finished, found)
        PartialState().wait_for_everyone()
    if context.is_main:
        shutil.rmtree(context.out / "resume", ignore_errors=True)
    return cast("dict[str, Any]", files.read_json(finished))


def _train(
    trainer: Trainer, data: TrainingData, config: TrlConfig, context: Context,
    save: Callable[[Trainer, TrlConfig, Path], None],
) -> dict[str, Any]:  # fmt: skip
    """Take the steps that are left, publish, and say what was trained."""
    trainable = _trainable_parameters(trainer, data, config, context)
    with PartialState().main_process_first():  # which deletes what is damaged
        point, problems = resume.newest(context.out / "resume")
    for problem in problems:
        context.note(problem)
    require_same_data(data.digest, context, is_resumed=point is not None)
    context.rewind(point.step if point else -1)  # held-out rows are measured at step 0 as well
    if point:
        context.resumed(point.step)

    data.order(trainer, config, context)
    epoch_rows = data.epoch_rows or len(trainer.train_dataset)

    def begin(steps: int) -> None:
        work = metrics.flops(trainer, data, config, data.tokens * steps * config.global_batch_size / epoch_rows)
        if data.can_compile:
            compile_trainer(trainer, config, context, work, varying_shapes=data.varying_shapes)

    def measure() -> dict[str, float]:
        return {} if trainer.eval_dataset is None else data.measure(trainer, data.weigh)

    device.open_trackers(trainer.accelerator, config.report_to, context.out / "logs", "posttrain")
    points = Points(trainer, context, point, data.extra)
    watch = Watch(points, config, begin, lambda folder: save(trainer, config, folder), measure, epoch_rows)
    if point:
        watch.totals.update(point.state["totals"])
    _observe(trainer, watch, data)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(watch)
    points.train()
    for tracker in trainer.accelerator.trackers:
        tracker.finish()
    if watch.stopping:
        context.stop(f"step {trainer.state.global_step} of {trainer.state.max_steps}")
    context.heart.enter("publish")
    save(trainer, config, context.out)
    return metrics.of_training(trainer, data, config, context, watch) | {"trainable_parameters": trainable}


def _observe(trainer: Trainer, watch: Watch, data: TrainingData) -> None:
    """Have each batch counted, its means kept, and told when a step's work without the other processes is done."""
    take_step, give_loss, means = trainer.training_step, trainer.compute_loss, metrics.Means(trainer, data.weigh)

    def counted(model: torch.nn.Module, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        loss = cast("torch.Tensor", take_step(model, inputs, *rest))
        watch.count(data.count(inputs))
        means.add(inputs)
        return loss

    def timed(*given: Any, **named: Any) -> Any:
        found = give_loss(*given, **named)
        watch.context.heart.alone()  # the last call of a step counts: its backward pass waits for the others
        return found

    trainer.training_step, trainer.compute_loss = counted, timed


def _trainable_parameters(trainer: Trainer, data: TrainingData, config: TrlConfig, context: Context) -> int:
    """How many parameters are trained; tells what a person should know before the first step."""
    trainable, found = trainable_parameters(trainer.model), start.find(config)
    for remark in (*found.notes, *compute.remarks(found.base, found.tokenizer)):
        context.note(remark)
    context.note(f"{data.rows} rows; {trainable:,} parameters to train")
    if isinstance(trainer.model, PeftModel):
        context.note(adapter_settings.coverage(trainer.model))
    return trainable


def trainable_parameters(model: torch.nn.Module) -> int:
    """Parameters that are trained.

    Raises:
        UserError: there are none.
    """
    count: int = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    if not count:
        raise UserError("there is nothing to train", key="lora")
    return count


def gathered(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All weights of a trainer's model by their own names, in its main process; every process has to call this."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # from all shards
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}  # as torch.compile names them


def publish(trainer: Trainer, config: TrlConfig, folder: Path) -> None:
    """Write the adapter, or the whole model, with the tokenizer of its base; every process has to call this."""
    weights = gathered(trainer)
    if trainer.accelerator.is_main_process:
        model, found = trainer.accelerator.unwrap_model(trainer.model), start.find(config)
        where = {"base": found.base, "tokenizer": found.tokenizer}
        if isinstance(model, PeftModel):
            earlier = found.adapter if config.adapter == "new" else None
            adapters.save(model, folder, **where, earlier=earlier, state_dict=weights)
        else:
            compute.save_model(model, folder, **where, chats=True, state_dict=weights)
    trainer.accelerator.wait_for_everyone()
