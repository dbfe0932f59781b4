"""Proves exact resume on your own recipe: a training that was killed ends as one that was not.

    python -m pretrain.prove_resume --config train.yaml

Four short trainings, as real processes: one to its end; one that is killed with SIGKILL, and continued; one at
another number of processes. The first and the continued one have to agree in every bit.
"""

import shutil
from typing import Any

from pydantic import Field

from cordee import certificate, worker
from cordee.certificate import Certificate
from cordee.errors import UserError
from cordee.stage import Context
from pretrain import train

VERSION = 1
PROVES = "pretrain.train"
RESUME_STEPS = 2


class Config(train.Config):
    """The keys of the training that is proven, and how long the short ones are."""

    steps: int = Field(default=6, ge=4)
    """Optimizer steps of each short training."""
    kill_at_step: int = Field(default=4, ge=RESUME_STEPS + 1)
    """The step after which one is killed, in the midst of the next; less than `steps`."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Train, kill, continue and compare; write `certificate.json`.

    Raises:
        UserError: the training would end before it is killed.
        Fault: a check failed; names it.
    """
    if config.kill_at_step >= config.steps:
        raise UserError(f"is not before the last of {config.steps} steps", key="kill_at_step")
    if not context.is_main:  # the trainings start processes of their own
        return {}
    from cordee.compute import device
    from pretrain.training import trials

    processes = config.launch.num_processes
    other = trials.other_processes(processes)
    work = context.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    total = 3 if other is None else 4
    # as the training itself is in its full length
    compiled, _ = device.resolve_compile(config.compile, train.cost(config, {}).flops or 0.0, device.default())
    settings = _short(config, max(processes, other or 1), compiled)
    context.progress(0, total, "trainings")
    whole = trials.start(settings, work / "uninterrupted", context).to_end()
    context.progress(1, total, "trainings")
    trials.start(settings, work / "killed", context).kill_after(config.kill_at_step)
    context.progress(2, total, "trainings")
    continued = trials.start(settings, work / "killed", context).to_end()
    checks = trials.same_bits(whole, continued)
    evidence = {
        "num_processes": processes,
        "settings": settings,
        "uninterrupted": whole.shown(),
        "killed": continued.shown(),
    }
    if other is not None:
        context.progress(3, total, "trainings")
        launch = {"num_processes": other, "config_file": None}
        compared = trials.start({**settings, "launch": launch}, work / "other", context).to_end()
        checks += trials.same_within_rounding(whole, compared)
        evidence |= {"other_num_processes": other, "other": compared.shown()}
    context.progress(total, total, "trainings")
    kind = f"a training in {whole.precision}{', compiled,' if compiled else ''} that is killed and continued"
    claim = f"{kind} ends in the same weights, bit for bit, and sees the same samples"
    if other is not None:
        claim += f"; {other} process{'es' if other > 1 else ''} see the same samples and end within rounding"
    proven = Certificate(proof="resume", of=PROVES, claim=claim, checks=tuple(checks), evidence=evidence)
    certificate.write(context.out, proven)
    shutil.rmtree(work)
    shown = evidence["killed"]
    return {"passed": True, "weights_sha256": shown["weights_sha256"], "resumed_from_step": shown["resumed_from_step"]}


def _short(config: Config, most_processes: int, compiled: bool) -> dict[str, Any]:
    """The same training, made short: few small steps, yet each with two passes in the largest number of processes."""
    values = config.model_dump(mode="json", include=set(train.Config.model_fields))
    return values | {
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


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
