"""What the reference model says of the answers that are trained on: once for each, before the first step.

The pass is kept in parts, in a folder named by all that decides about its numbers: one that was stopped goes on, and
another training on the same data with the same reference reads it. So no second model is in memory.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel

from cordee import files, model_folder
from cordee.errors import Fault, UserError
from cordee.stage import Context
from posttrain.losses.pairs import token_weights
from posttrain.training import start
from posttrain.training.preference_rows import PreferenceRows
from posttrain.training.preference_trainer import PreferenceTrainer
from posttrain.training.settings import TrlConfig

VERSION = 1
"""Raised when the same reference gives other numbers."""
FOLDER = "reference_logprobs"
BATCHES = 32
"""Batches of a process in each part that is kept."""
CHECKED = 16
"""Answers of each source whose log-probability the rows tell and which are computed anew."""
TOLERANCE, TOLERANCE_PER_TOKEN = 0.1, 0.01
"""Nats by which the two may differ: an answer's, and in addition for each of its tokens, for other rounding."""


def fill(trainer: PreferenceTrainer, rows: PreferenceRows, config: TrlConfig, context: Context) -> bool:
    """Give rows the log-probabilities of the reference: those in the data, and what is computed of the rest.

    The reference is the model as it is when the training begins; of a new adapter, the model without it.

    Args:
        trainer: its model computes them.
        rows: get their `reference`.
        config: the stage's config.
        context: keeps the pass, and is told.

    Returns:
        Whether any are from the data.

    Raises:
        UserError: what rows say is not what the model gives.
        Stopped: a stop was asked for; what was computed is kept.
    """
    given = rows.given_references()
    is_given = ~np.isnan(given)
    checked = _checked(rows, is_given)
    computed = np.flatnonzero(~is_given | np.isin(np.arange(given.size).reshape(given.shape), checked))
    # the longest first, so that a batch has little padding
    computed = computed[np.argsort(-rows.column_lengths.reshape(-1)[computed], kind="stable")]
    name = [_name(trainer, rows, config, computed) if trainer.accelerator.is_main_process else ""]
    folder = context.cache / FOLDER / str(broadcast_object_list(name)[0])
    values, reused = _computed(trainer, rows, computed, folder, context, adapter_is_off=config.lora is not None)
    found = given.reshape(-1).copy()
    anew = dict(zip(computed.tolist(), values.tolist(), strict=True))
    for at in checked.tolist():
        _require_same(rows, at, float(found[at]), anew[at])
    unknown = np.isnan(found[computed])
    found[computed[unknown]] = values[unknown]
    rows.reference = found.reshape(given.shape).astype(np.float32)
    context.note(
        f"log-probabilities of the reference: {given.size} answers, {int(is_given.sum())} from the data, "
        f"{reused} from the cache"
    )
    return bool(is_given.any())


def _checked(rows: PreferenceRows, is_given: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Which answers that have a log-probability are computed anew, of `[distinct · num_answers]`: all over a source."""
    sources, some = rows.distinct.sources(), np.zeros(is_given.shape, dtype=bool)
    for source in np.unique(sources):
        known = np.flatnonzero((sources == source) & is_given.any(axis=1))
        if len(known):
            some[known[np.linspace(0, len(known) - 1, CHECKED // rows.num_answers).astype(int)]] = True
    return np.flatnonzero(some & is_given)


def _require_same(rows: PreferenceRows, at: int, given: float, computed: float) -> None:
    """See that a row's own log-probability is the model's.

    Raises:
        UserError: it is not.
    """
    distinct, column = divmod(at, rows.num_answers)
    allowed = TOLERANCE + TOLERANCE_PER_TOKEN * len(rows.tokens(distinct, column)[1])
    if abs(given - computed) <= allowed:
        return
    row = rows.distinct[distinct]
    raise UserError(
        f"says that the reference's log-probability of the answer is {given:.4f} nats, and the model gives "
        f"{computed:.4f}: it was scored by another model, or with another chat template",
        file=row.file,
        key=f"row {row.number}",
        hint=f"score it anew, or leave the columns out: `ignore: [{', '.join(rows.reference_columns)}]`",
    )


def _name(trainer: PreferenceTrainer, rows: PreferenceRows, config: TrlConfig, computed: npt.NDArray[np.int64]) -> str:
    """A name for all that decides about the numbers."""
    found, args = start.find(config), trainer.args
    folders = [folder for folder in (found.base, found.adapter) if folder]
    told = {
        "version": [VERSION, *(importlib.metadata.version(name) for name in ("torch", "transformers"))],
        "weights": [model_folder.weight_hashes(folder) for folder in folders],
        "config": [
            files.sha256(path)
            for folder in folders
            for path in (folder / "config.json", folder / model_folder.ADAPTER_CONFIG)
            if path.is_file()
        ],
        "opened": [config.trainer.get("model_init_kwargs"), config.quantization, config.added_tokens, config.adapter],
        "precision": [args.bf16, args.fp16, args.tf32, args.device.type],
        "sequences": [part.report["digest"] for part in rows.sequences.parts],
        "which": hashlib.sha256(rows.distinct.places.tobytes() + computed.tobytes()).hexdigest(),
        "answers": [rows.objective.sides, rows.objective.has_kl, rows.objective.tail_weight, rows.longest],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _computed(
    trainer: PreferenceTrainer,
    rows: PreferenceRows,
    which: npt.NDArray[np.int64],
    folder: Path,
    context: Context,
    *,
    adapter_is_off: bool,
) -> tuple[npt.NDArray[np.float64], int]:
    """The log-probabilities of the answers at places of `[distinct, num_answers]`, and how many were kept before."""
    accelerator = trainer.accelerator
    size = trainer.args.per_device_train_batch_size * len(rows.objective.sides)
    each = size * BATCHES * accelerator.num_processes
    parts = [which[first : first + each] for first in range(0, len(which), each)]
    kept: list[list[list[float] | None]] = [[]]
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # when it was last used, for `cordee clean`
        kept = [[_kept(_file(folder, at * each, part), len(part)) for at, part in enumerate(parts)]]
    found = broadcast_object_list(kept)[0]
    reused = sum(map(len, filter(None, found)))
    model = trainer.model
    was_training = model.training
    model.eval()
    with _reference(trainer, adapter_is_off=adapter_is_off):
        for at, part in enumerate(parts):
            if found[at] is not None:
                continue
            _stop_if_asked(trainer, context, f"answer {at * each} of {len(which)}")
            found[at] = _part(trainer, rows, part, size)
            context.progress(at * each + len(part), len(which), "answers scored by the reference")
            if accelerator.is_main_process:
                files.write_sealed(_file(folder, at * each, part), {"logprobs": found[at]})
    model.train(was_training)
    accelerator.wait_for_everyone()
    return np.array([value for values in found for value in values], np.float64), reused


def _file(folder: Path, first: int, part: npt.NDArray[np.int64]) -> Path:
    """Named by the range of a part: another batch size cuts others."""
    return folder / f"{first:09}-{first + len(part):09}.json"


def _kept(path: Path, count: int) -> list[float] | None:
    """The numbers of a part that was computed before, if it is whole."""
    try:
        values: list[float] = files.read_sealed(path)["logprobs"]
    except Fault:
        return None
    return values if len(values) == count else None


def _stop_if_asked(trainer: PreferenceTrainer, context: Context, where: str) -> None:
    """Stop all processes at the same part."""
    asked = torch.tensor(float(context.stop_requested()), device=trainer.args.device)
    if trainer.accelerator.reduce(asked, "sum") > 0:
        context.stop(f"{where} that the reference scores")


@contextlib.contextmanager
def _reference(trainer: PreferenceTrainer, *, adapter_is_off: bool) -> Iterator[None]:
    """In here the model is the reference, and computes as it does in training."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_off = adapter_is_off and isinstance(model, PeftModel)
    off = model.disable_adapter() if is_off else contextlib.nullcontext()
    with off, torch.no_grad(), trainer.accelerator.autocast():
        yield


def _part(trainer: PreferenceTrainer, rows: PreferenceRows, which: npt.NDArray[np.int64], size: int) -> list[float]:
    """The log-probabilities of some answers, nats; each process computes its share of the batches, all equally many."""
    accelerator, device = trainer.accelerator, trainer.args.device
    values = torch.zeros(len(which), dtype=torch.float64, device=device)
    firsts = list(range(0, len(which), size))
    for turn in range(0, len(firsts), accelerator.num_processes):
        mine = turn + accelerator.process_index
        first = firsts[mine] if mine < len(firsts) else firsts[0]  # a sharded model has to run in all processes
        scored = _scored(trainer, rows, which[first : first + size])
        if mine < len(firsts):
            values[first : first + size] = scored.to(device)
    whole: list[float] = accelerator.reduce(values, "sum").tolist()
    return whole


def _scored(trainer: PreferenceTrainer, rows: PreferenceRows, which: npt.NDArray[np.int64]) -> torch.Tensor:
    """`[answers]`, float64: the log-probabilities of a batch of answers, nats."""
    places = [divmod(int(at), rows.num_answers) for at in which]
    batch = trainer._prepare_inputs(  # noqa: SLF001 - as its own training step does
        trainer.data_collator.padded([rows.tokens(*place) for place in places])
    )
    sides = range(len(rows.objective.sides))
    shared = [min(len(rows.tokens(distinct, side)[1]) for side in sides) for distinct, _ in places]
    logprobs = trainer.forward(trainer.model, batch).log_probs.float()
    is_answer = batch["completion_mask"][:, 1:].bool()
    weights = token_weights(is_answer, torch.tensor(shared, device=is_answer.device), rows.objective.tail_weight)
    return (logprobs * weights).sum(1).double()
