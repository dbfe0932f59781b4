"""What the stages that train with TRL share: arguments, model, resume points that survive a kill, and being heard.

A *resume point* is a checkpoint of transformers' `Trainer` below `resume/` that was flushed and then marked with the
hashes of its files. `Trainer` writes its checkpoints file by file, so one without a mark, or whose files are not
those that the mark lists, is what a kill has left and is deleted.
"""

import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import torch.distributed
import transformers
import trl.trainer.utils
from accelerate import PartialState
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from cordee import files
from cordee.compute import device
from cordee.compute import model as compute
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import Fault, UserError
from cordee.stage import Context
from posttrain.settings import TrlConfig

MARK = "complete.json"
Arguments = TypeVar("Arguments", bound=transformers.TrainingArguments)


def arguments(kind: type[Arguments], config: TrlConfig, context: Context, **ours: Any) -> Arguments:
    """The library's own config: its defaults, the recipe's `trainer:`, and what the stage sets itself.

    The libraries' own progress bars are turned off, since the stage tells its progress itself.

    Args:
        kind: `SFTConfig`, `DPOConfig`, …
        config: the stage's config; it holds `trainer`.
        context: where to write, and the seed.
        ours: further fields that the stage sets, over the recipe's.

    Raises:
        UserError: the library refuses a value, or `accelerate launch` was told what is the stage's own.
        Fault: other processes run than were asked for.
    """
    _set_up_libraries()
    device.require_own_precision(config.launch)
    given: dict[str, Any] = dict(config.trainer)
    given.pop("model_init_kwargs", None)
    at_once = config.per_device_train_batch_size * config.launch.num_processes
    settings = {
        "gradient_checkpointing": False,
        **given,
        "output_dir": str(context.out / "resume"),
        "seed": context.seed,
        "data_seed": context.seed,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.global_batch_size // at_once,
        "logging_steps": 1,  # `Watch` thins them out; a mean over steps would change with a resume in their middle
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
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
    return made


def _set_up_libraries() -> None:
    """Same bits twice; no progress bars beside our own; on a CPU, too, only positions with loss go through the LM head.

    TRL leaves the masked positions out only where Triton runs, since their number changes from batch to batch. On a
    CPU that costs nothing, and with short answers the head is most of a small model's work.
    """
    device.require_determinism()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not hasattr(trl.trainer.utils, "_use_triton"):
        raise Fault("this TRL has another fused LM head", hint="use the versions that requirements.txt pins")
    trl.trainer.utils._use_triton = lambda device: device.type in ("cpu", "cuda", "xpu")  # noqa: SLF001 - the only handle


def open_model(config: TrlConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in float32 unless `trainer: {model_init_kwargs: {dtype: …}}` says otherwise, and its tokenizer.

    Raises:
        UserError: the folder holds no model, or no tokenizer with a chat template and a padding token.
        Fault: it is damaged.
    """
    options = {"dtype": "float32", **(config.trainer.get("model_init_kwargs") or {})}
    dtype = options.pop("dtype")
    model = compute.open_model(
        config.model, dtype=None if dtype == "auto" else getattr(torch, dtype), key="model", **options
    )
    tokenizer = open_tokenizer(config.model, key="model")
    if not tokenizer.chat_template:
        raise UserError("its tokenizer has no chat template", file=config.model, key="model")
    if tokenizer.pad_token_id is None:
        raise UserError("its tokenizer has no padding token", file=config.model, key="model")
    return model, tokenizer


def once(context: Context, train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a training returns, or returned before it was killed between its end and the artifact's publishing.

    `training.json` is written when all the rest is; only then do the resume points go.
    """
    finished = context.out / "training.json"
    if not finished.exists():
        metrics = train()
        if context.is_main:
            files.write_json(finished, metrics)
        PartialState().wait_for_everyone()
    if context.is_main:
        shutil.rmtree(context.out / "resume", ignore_errors=True)
    return files.read_json(finished)


def train(trainer: Trainer, config: TrlConfig, context: Context, tokens_per_epoch: float) -> dict[str, float]:
    """Train from the newest whole resume point, or from the start, to the end.

    Args:
        trainer: a trainer whose arguments come from `arguments`.
        config: the stage's config.
        context: where to write and whom to tell.
        tokens_per_epoch: tokens of one pass over the data, all processes together; for the tokens per second.

    Returns:
        `steps`, `loss` (the last one logged), `parameters` (all), `num_processes` and what TRL logged last, such as
        `mean_token_accuracy`.

    Raises:
        Stopped: a stop was asked for; the state is saved.
        Fault: the loss is no number, or several processes run with the model left unwrapped.
    """
    point = newest_resume_point(context.out / "resume")
    start = int(point.name.rpartition("-")[2]) if point else 0
    context.rewind(start)
    if start:
        context.note(f"goes on from step {start}")
    watch = Watch(trainer, config, context, tokens_per_epoch)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=str(point) if point else None)
    state = trainer.state
    if watch.stopping:
        context.stop(f"step {state.global_step} of {state.max_steps}")
    last = next((row for row in reversed(state.log_history) if "loss" in row), {})
    figures = {name: float(value) for name, value in last.items() if name not in ("step", "num_tokens")}
    parameters = sum(weights.numel() for weights in trainer.accelerator.unwrap_model(trainer.model).parameters())
    processes = trainer.accelerator.num_processes
    return {**figures, "steps": state.global_step, "parameters": parameters, "num_processes": processes}


def gather_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The trained weights by their own names, gathered from all shards: every process takes part."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}  # as torch.compile names them


def save(trainer: Trainer, config: TrlConfig, context: Context) -> None:
    """Write the trained model with the tokenizer that it came with into the artifact."""
    weights = gather_weights(trainer)
    if context.is_main:
        model = trainer.accelerator.unwrap_model(trainer.model)
        compute.save_model(model, context.out, tokenizer=config.model, state_dict=weights)
    trainer.accelerator.wait_for_everyone()


def newest_resume_point(folder: Path) -> Path | None:
    """The newest resume point whose files are those that its mark lists; what a kill has left is deleted."""
    state = PartialState()
    if state.is_main_process:
        for path in folder.glob("checkpoint-*"):
            if not _is_whole(path):
                shutil.rmtree(path)
    state.wait_for_everyone()
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has its mark, and every file that the mark lists with the same content."""
    if not (checkpoint / MARK).exists():
        return False
    hashes: dict[str, str] = files.read_json(checkpoint / MARK)
    return all(
        (checkpoint / name).is_file() and files.sha256(checkpoint / name) == value for name, value in hashes.items()
    )


class Watch(TrainerCallback):
    """Tells the run how far it is, marks resume points, and ends training where a stop was asked for."""

    def __init__(self, trainer: Trainer, config: TrlConfig, context: Context, tokens_per_epoch: float) -> None:
        self.trainer, self.config, self.context = trainer, config, context
        self.tokens_per_epoch = tokens_per_epoch
        self.stopping = False
        self.first_step, self.began_s, self.told_s = 0, 0.0, 0.0
        self.figures: dict[str, float] = {}

    def on_train_begin(self, _args: Any, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Check that several processes really train one model; start the clock."""
        wrapped = getattr(self.trainer.model_wrapped, "_orig_mod", self.trainer.model_wrapped)
        device.require_wrapped(wrapped, self.trainer.accelerator.num_processes, self.config.launch)
        self.first_step, self.began_s = state.global_step, time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell how far it is, at most once a second, and ask every process whether to stop."""
        now = time.monotonic()
        if now - self.told_s >= 1 or state.global_step == state.max_steps:
            self.told_s = now
            steps_per_s = (state.global_step - self.first_step) / max(now - self.began_s, 1e-9)
            tokens_per_step = self.tokens_per_epoch * state.num_train_epochs / max(state.max_steps, 1)
            self.context.progress(
                state.global_step,
                state.max_steps,
                "steps",
                **self.figures,
                tokens_per_s=round(steps_per_s * tokens_per_step),
            )
        if state.global_step >= state.max_steps:
            control.should_save = False  # resumed from its last step, `Trainer` would take one more
        elif _any_process(self.context.stop_requested(), args.device):
            self.stopping = control.should_save = control.should_training_stop = True

    def on_log(
        self, _args: Any, state: TrainerState, _control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """Write one line of metrics; a loss that is no number ends the training."""
        if "loss" not in logs:
            return
        values = {name: float(value) for name, value in logs.items() if name != "num_tokens"}  # TRL counts padding too
        if not math.isfinite(values["loss"]):
            raise Fault(
                f"the loss is {values['loss']} at step {state.global_step}",
                file=self.context.out,
                hint="lower trainer.learning_rate, or look at the data of this step",
            )
        if state.global_step % self.config.logging_steps == 0 or state.global_step == state.max_steps:
            self.context.log(state.global_step, **values, tokens=round(self.tokens_per_epoch * (state.epoch or 0)))
        self.figures = {"loss": values["loss"]}

    def on_save(self, args: Any, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Flush the checkpoint that every process has written its part of, then mark it as whole."""
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files.sync_tree(folder)
            hashes = {str(path.relative_to(folder)): files.sha256(path) for path in files.walk(folder)}
            files.write_json(folder / MARK, hashes)
            files.sync_folder(folder.parent)
        processes.wait_for_everyone()


def _any_process(flag: bool, where: torch.device) -> bool:
    """Whether the flag is up in any process: all must stop at the same step, or one waits for ever."""
    if not torch.distributed.is_initialized():
        return flag
    highest = torch.tensor(int(flag), device=where)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    return bool(highest.item())
