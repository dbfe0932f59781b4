"""Assembles a training before its first step, with every check that can be made by then."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import PreTrainedModel

from cordee import files, model_folder
from cordee.compute import device, meta, resume
from cordee.compute.model import remarks
from cordee.cost import training_flops
from cordee.errors import UserError
from cordee.stage import Context
from pretrain.data.loader import open_split, require_ids_below
from pretrain.data.mixture import Mixture
from pretrain.training import loop, optimizers
from pretrain.training.heldout import open_heldout
from pretrain.training.loop import State, Training
from pretrain.training.model import Objective, blueprint, build, fill, require_documents_apart
from pretrain.training.settings import Settings


@dataclass(frozen=True)
class Data:
    """The data of a training."""

    folders: Sequence[Path]
    """Tokens artifacts."""
    weights: Sequence[float]
    long_documents: Literal["error", "split"]


def assemble(settings: Settings, context: Context, model: Path, data: Data) -> Training:
    """Open the data, build the model, and put it on its devices.

    Raises:
        UserError: the data, model or batch do not fit each other.
        Fault: what runs differs from what was asked for.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    context.heart.enter("data")
    context.waits("the model and the data")
    tokens = data.folders[0]
    accelerator = device.open_accelerator(settings.launch, deterministic=settings.deterministic)
    mixture, heldout = _open_data(data, settings.sequence_length, context.seed)
    wrapped, objective = _open_objective(settings, context, model, tokens, accelerator)
    rows = objective.model.get_input_embeddings().weight.shape[0]
    for index, folder in enumerate(data.folders):
        for split in (mixture.splits[index], heldout.splits[index]):
            require_ids_below(rows, split, folder, f"data.{index}.tokens")
    optimizer = getattr(optimizers, settings.optimizer)(objective, settings)
    # the folder whose tokenizer, and generation settings if it is a model, are published with each checkpoint
    files_from = model if model.is_dir() else tokens / "tokenizer"
    for remark in remarks(files_from):
        context.note(remark)
    saver = resume.Saver(context, objective, optimizer)
    training = Training(
        settings, context, accelerator, wrapped, objective, optimizer, saver, mixture, heldout, files_from
    )
    compiled, why = resolve_compile(settings, objective.model, accelerator.device)
    if compiled:
        device.compile_module(objective, dynamic=False)
    context.note(f"computes in {settings.precision}; {'compiled' if compiled else 'not compiled'}: {why}")
    device.open_trackers(accelerator, settings.report_to, context.out / "logs", "pretrain")
    return training


def _open_objective(
    settings: Settings, context: Context, source: Path, tokens: Path, accelerator: Accelerator
) -> tuple[nn.Module, Objective]:
    """The model with its loss, as the processes run it and without DDP; where they shard it, none ever holds all."""
    given = (source, tokens, settings.sequence_length)
    if not accelerator.is_fsdp2:
        objective = Objective(build(*given, context.seed), settings)
        if accelerator.is_main_process:
            require_documents_apart(objective, torch.device("cpu"))
        wrapped = accelerator.prepare(objective)
        device.require_wrapped(wrapped, accelerator.num_processes, settings.launch)
        return wrapped, accelerator.unwrap_model(wrapped)
    if source.is_dir() and accelerator.is_main_process:
        model_folder.require_undamaged(source)
    objective = Objective(meta.shapes(blueprint(*given)).train(), settings)
    plugin = accelerator.state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = False  # it sends a whole model from the main process
    no_optimizer = torch.optim.SGD([*objective.parameters()][:1])  # accelerate shards no model without one
    objective, _ = accelerator.prepare(objective, no_optimizer)
    device.require_wrapped(objective, accelerator.num_processes, settings.launch)
    offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    objective.to_empty(device=torch.device("cpu") if offloads else accelerator.device)
    if not fill(objective.model, *given, context.seed):
        context.note("this architecture is not filled module by module: each process held the whole model at its start")
    require_documents_apart(objective, accelerator.device)
    return objective, objective


def resolve_compile(settings: Settings, model: PreTrainedModel, where: torch.device) -> tuple[bool, str]:
    """Whether the training of a model, of which only the shape counts, is compiled on a device, and why."""
    return device.resolve_compile(settings.compile, _flops(model, settings, _planned_tokens(settings)), where)


def _open_data(data: Data, sequence_length: int, seed: int) -> tuple[Mixture, Any]:
    """The training stream and the held-out documents of all sources."""
    tokenizers = [files.sha256(folder / "tokenizer" / "tokenizer.json") for folder in data.folders]
    splits: dict[str, list[Any]] = {"train": [], "heldout": []}
    for index, folder in enumerate(data.folders):
        key = f"data.{index}.tokens"
        if tokenizers[index] != tokenizers[0]:
            raise UserError(f"made with another tokenizer than {data.folders[0]}", file=folder, key=key)
        for name, found in splits.items():
            found.append(open_split(folder, name, sequence_length, data.long_documents, key))
        if not splits["train"][-1].rows:
            raise UserError("holds no training documents", file=folder, key=key)
    return Mixture(splits["train"], data.weights, seed), open_heldout(splits["heldout"], data.folders)


def restore(training: Training) -> State:
    """Restore the newest complete resume point, or begin at step 0; returns the state."""
    context, folder = training.context, training.context.out / "resume"
    found, problems = resume.newest(folder) if context.is_main else (None, [])
    for problem in problems:
        context.note(problem)
    step = broadcast_object_list([found.step if found else None])[0]
    if step is None:
        context.rewind(-1)
        return State(source_tokens=[0] * len(training.mixture.splits))
    point = found or resume.at(folder, step)
    resume.restore(point, training.objective, training.optimizer)
    context.rewind(step)
    context.resumed(step)
    return State.of(point.state)


def dry_run(training: Training) -> None:
    """Run the first batch forward and backward: compiles the model, and finds what does not fit into memory.

    Raises:
        Fault: it does not fit into the device's memory, or can't be compiled.
    """
    began = time.perf_counter()
    training.context.heart.enter("compile")
    training.context.waits(f"the first step{', which is compiled' if training.objective.is_compiled else ''}")
    with device.first_pass():
        loop.first_batch(training)
    training.optimizer.zero_grad()
    if training.objective.is_compiled:
        training.context.note(f"compiled in {time.perf_counter() - began:.0f} s")


def metrics(training: Training, state: State) -> dict[str, Any]:
    """The metrics of a training that has ended."""
    tokens = sum(state.source_tokens)
    settings, mixture, model = training.settings, training.mixture, training.objective.model
    flops = _flops(model, settings, tokens)
    epochs = mixture.epochs((settings.max_steps + state.skipped) * settings.global_batch_size)
    by_source = {
        f"data.{index}.{name}": value
        for index, source_tokens in enumerate(state.source_tokens)
        for name, value in (("token_share", source_tokens / tokens), ("epochs", epochs[index]))
    }
    return {
        "tokens": tokens,
        "labels": state.labels,
        "flops": flops,
        "parameters": model.num_parameters(),
        "num_processes": training.accelerator.num_processes,
        "loss": state.loss,
        "rollbacks": state.rollbacks,
        "skipped_steps": state.skipped,
        "precision": settings.precision,
        "compiled": training.objective.is_compiled,
        "tokens_per_s": tokens / state.seconds,
        "model_flops_per_s": flops / state.seconds,
        "padding_share": 1 - tokens / _planned_tokens(settings),
        **by_source,
    }


def _planned_tokens(settings: Settings) -> int:
    return settings.max_steps * settings.global_batch_size * settings.sequence_length


def _flops(model: PreTrainedModel, settings: Settings, tokens: float) -> float:
    shape = model.config.get_text_config()
    layers, width = shape.num_hidden_layers, shape.hidden_size
    return training_flops(model.num_parameters(), tokens, layers, width, settings.sequence_length)
