"""A stage that a person starts by itself: `accelerate launch -m posttrain.sft --config FILE [key=value …]`.

FILE holds the stage's keys; the result is published as `runs/<file's name>/<stage>@<n>`, as a recipe with
this one stage would publish it. The main process opens and publishes; the others wait for its word.
"""

import json
import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cordee import artifact, config, files, lock, plan, recipe, runner, yaml12
from cordee.artifact import Store, Work
from cordee.display import Display
from cordee.errors import Fault
from cordee.stage import Context

WAIT_S = 600.0
LAUNCH = (
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID"),
)
"""The variables in which launchers tell one launch from another."""


def run(
    uses: str,
    file: Path,
    overrides: Sequence[str],
    root: Path,
    run_stage: Callable[[config.Config, Context], dict[str, Any]],
) -> None:
    """Run one stage from its own YAML file.

    Raises:
        CordeeError: the file is wrong, or the stage failed.
    """
    made = plan.make(_recipe(uses, file, overrides), Store(root))
    planned = made.stages[0]
    console = Console(stderr=True)
    if planned.artifact:
        console.print(f"{planned.artifact.name} is this already")
        return
    if int(os.environ.get("RANK", "0")) != 0:
        job = _await_job(made, planned)
        run_stage(planned.item.stage.config.model_validate(job["config"]), _context(job))
        return
    with lock.hold(root / made.recipe.name / f".{planned.name}.lock"):
        work = made.store.work_folders(made.recipe.name, planned.name, planned.fingerprint)
        work.out.mkdir(parents=True, exist_ok=True)
        told = runner.manifest(made, planned, {})
        job = runner.write_job(made, planned, work, config.resolved(planned.config, runner.resolve(made, planned, {})))
        files.write_text(work.logs / "launch", _launch())
        with Display(console) as display:
            display.begin(planned.name, f"starts as {made.recipe.name}/{planned.name}@{work.version}")
            metrics = _shown(
                work, display, lambda: run_stage(type(planned.config).model_validate(job["config"]), _context(job))
            )
            manifest = told | {
                "metrics": metrics,
                "proves": None,
                "seconds": round(runner.worked_s(work), 3),
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            display.end(f"published {artifact.publish(work, manifest).name}")


def _recipe(uses: str, file: Path, overrides: Sequence[str]) -> recipe.Recipe:
    """The recipe of one stage that a file of this stage's keys stands for."""
    values = yaml12.read(file)
    name, seed = uses.rpartition(".")[2], values.pop("seed", 0)
    document = {"name": file.stem, "seed": seed, "stages": {name: {"uses": uses, **values}}}
    for override in overrides:
        recipe.apply_override(document, override if override.startswith("seed=") else f"{name}.{override}")
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:  # the person's own launcher says how many
        launch = document["stages"][name].setdefault("launch", {})
        document["stages"][name]["launch"] = {"num_processes": processes, **launch}
    return recipe.check(document, file)


def _context(job: dict[str, Any]) -> Context:
    return Context(out=Path(job["out"]), seed=job["seed"], events=Path(job["events"]))


def _launch() -> str:
    """What the processes of one launch have in common with each other, and with no earlier launch."""
    environment = [os.environ.get(name, "") for name in LAUNCH]
    # By default the variables say the same of every launch; on one machine the launcher's process tells them apart.
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return json.dumps([*environment, lock.owner(os.getppid()) if is_one_machine else None])


def _await_job(made: plan.Plan, planned: plan.Planned) -> dict[str, Any]:
    """The job that this launch's main process wrote."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        work = made.store.work_folders(made.recipe.name, planned.name, planned.fingerprint)
        mark = work.logs / "launch"
        if mark.exists() and mark.read_text(encoding="utf-8") == _launch():
            job: dict[str, Any] = files.read_json(work.job)
            return job
        time.sleep(runner.POLL_S)
    raise Fault(f"the main process did not open the artifact within {WAIT_S:.0f} s", file=made.store.root)


def _shown(work: Work, display: Display, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call a stage while a thread shows its events."""
    tail, ended = runner.begin_events(work), threading.Event()

    def show() -> None:
        while not ended.wait(runner.POLL_S):
            for event in tail.read():
                display.event(event)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        return call()
    finally:
        ended.set()
        thread.join()
