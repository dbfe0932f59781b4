"""Proves exact resume on your own recipe: a killed and resumed training ends in the same weights.

    python -m pretrain.prove_resume --config train.yaml

It runs short trainings as the runner starts them: one to its end; one that is killed with SIGKILL and resumed; one with
another number of processes. The first and the resumed one must agree in every bit.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cordee import certificate, trial, worker
from cordee.certificate import Certificate, Conditions
from cordee.errors import UserError
from cordee.stage import Context
from pretrain import train

if TYPE_CHECKING:
    from pretrain.training.trials import Ended

VERSION = 2
PROVES = "pretrain.train"
RESUME_STEPS = 2


class Config(train.Config, Conditions):
    """The keys of the training that is proven, and the length of the short ones."""

    is_launched: ClassVar[bool] = False

    steps: int = Field(default=6, ge=4)
    """Optimizer steps of each short training."""
    kill_at_step: int = Field(default=4, ge=RESUME_STEPS + 1)
    """The step after which one is killed, during the next step; less than `steps`."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Train, kill, continue and compare; write `certificate.json`.

    Raises:
        UserError: the training would end before it is killed, or a launcher started this proof.
        Fault: a check failed; names it.
    """
    if config.kill_at_step >= config.steps:
        raise UserError(f"is not before the last of {config.steps} steps", key="kill_at_step")
    if "LOCAL_RANK" in os.environ:
        hint = "start it with python -m pretrain.prove_resume"
        raise UserError("it was started by a launcher, and launches its own trainings", hint=hint)
    from cordee.compute import device
    from pretrain.training import assembly, trials
    from pretrain.training.model import shape

    processes = config.launch.num_processes
    other = trials.other_processes(processes)
    work = context.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    total = 3 if other is None else 4
    # whether it is compiled follows from the length of the training itself
    model, where = shape(config.model, config.data[0].tokens), device.of_launch(config.launch)
    compiled, _ = assembly.resolve_compile(config, model, where)
    short = _short(config, max(processes, other or 1), compiled)
    context.progress(0, total, "trainings")
    whole = _to_end(short, work / "uninterrupted", context)
    context.progress(1, total, "trainings")
    trial.start(PROVES, short, work / "killed", context).kill_after(config.kill_at_step)
    context.progress(2, total, "trainings")
    continued = _to_end(short, work / "killed", context)
    checks = trials.same_bits(whole, continued)
    shown = continued.shown()
    evidence = {
        "num_processes": processes,
        "settings": short.model_dump(mode="json"),
        "uninterrupted": whole.shown(),
        "killed": shown,
    }
    if other is not None:
        context.progress(3, total, "trainings")
        launch = short.launch.model_copy(update={"num_processes": other, "config_file": None})
        compared = _to_end(short.model_copy(update={"launch": launch}), work / "other", context)
        checks += trials.same_within_rounding(whole, compared)
        evidence |= {"other_num_processes": other, "other": compared.shown()}
    context.progress(total, total, "trainings")
    kind = f"a training in {whole.precision}{', compiled,' if compiled else ''} that is killed and resumed"
    claim = f"{kind} ends in the same weights, bit for bit, and sees the same samples"
    if other is not None:
        claim += f"; {other} process{'es' if other > 1 else ''} see the same samples and end within rounding"
    proven = Certificate(
        proof="resume", of=PROVES, claim=claim, conditions=config.conditions, checks=tuple(checks), evidence=evidence
    )
    certificate.write(context.out, proven)
    shutil.rmtree(work)
    return {"passed": True, "weights_sha256": shown["weights_sha256"], "resumed_from_step": shown["resumed_from_step"]}


def _to_end(config: train.Config, folder: Path, context: Context) -> "Ended":
    """Train to the end, from the start or from the newest resume point in this folder."""
    from pretrain.training.trials import Ended

    training = trial.start(PROVES, config, folder, context)
    training.to_end()
    return Ended(training.work.out, training.resumed_from())


def _short(config: Config, most_processes: int, compiled: bool) -> train.Config:
    """The same training with few and small steps, each of two passes at the largest number of processes."""
    values = config.model_dump(mode="json", include=set(train.Config.model_fields))
    return train.Config.model_validate(
        values
        | {
            "max_steps": config.steps,
            "warmup_steps": min(config.warmup_steps, 2),
            "decay_steps": min(config.decay_steps, 2),
            "per_device_train_batch_size": 1,
            "global_batch_size": 2 * most_processes,
            "compile": "on" if compiled else "off",
            "eval_steps": 0,
            "save_steps": [1],
            "resume_steps": RESUME_STEPS,
            "logging_steps": 1,
            "report_to": [],
        }
    )


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
