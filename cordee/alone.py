"""A stage that is started without a recipe: `accelerate launch -m posttrain.sft --config FILE [key=value …]`.

FILE holds the stage's keys. The result is published as `runs/<name of FILE>/<stage>@<n>`, as by a recipe with this one
stage. The main process begins the attempt and publishes it; the other processes wait for its job.
"""

import json
import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cordee import attempt, config, events, files, hashes, launchers, lock, plan, recipe, runner, yaml12
from cordee.artifact import Artifact, Store
from cordee.display import Display, screen
from cordee.errors import Fault
from cordee.plan import Plan, Planned
from cordee.stage import Context
from cordee.work import Work

WAIT_S = 600.0
LAUNCH = (
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID"),
)
"""The variables by which launchers tell one launch from another."""


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
    os.environ.update(launchers.caches(root))
    own = plan.make(_recipe(uses, file, overrides), Store(root))
    planned = own.stages[0]
    console = screen(stderr=True)
    if planned.artifact:
        console.print(f"{planned.artifact.name} is this already")
        return
    if int(os.environ.get("RANK", "0")) != 0:
        _run_job(_await_job(own, planned), planned, run_stage)
        return
    with attempt.begin(own, planned, {}) as current:
        if isinstance(current, Artifact):
            console.print(f"{current.name} is this already")
            return
        runner.keep_recipe(own)
        files.write_text(_launch_file(current.work), _launch())
        with Display(console) as display:
            display.begin(planned.name, current.announce())
            metrics = _shown(current.work, display, lambda: _run_job(current.job, planned, run_stage))
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            display.end(planned.name, f"published {current.publish(metrics, memory).name}")


def _recipe(uses: str, file: Path, overrides: Sequence[str]) -> recipe.Recipe:
    """The recipe of one stage that has the keys in a file."""
    values = yaml12.read(file)
    name, seed = uses.rpartition(".")[2], values.pop("seed", 0)
    document = {"name": file.stem, "seed": seed, "stages": {name: {"uses": uses, **values}}}
    for override in overrides:
        recipe.apply_override(document, override if override.startswith("seed=") else f"{name}.{override}")
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:  # set by the user's own launcher
        launch = document["stages"][name].setdefault("launch", {})
        document["stages"][name]["launch"] = {"num_processes": processes, **launch}
    return recipe.check(document, file)


def _run_job(
    job: dict[str, Any], planned: Planned, run_stage: Callable[[config.Config, Context], dict[str, Any]]
) -> dict[str, Any]:
    """Run the stage in this process; returns its metrics."""
    hashes.trust(job["hashes"])
    context = Context(out=Path(job["out"]), seed=job["seed"], events=Path(job["events"]))
    return run_stage(planned.item.stage.config.model_validate(job["config"]), context)


def _launch_file(work: Work) -> Path:
    """Names the launch whose main process has written the job."""
    return work.logs / "launch"


def _launch() -> str:
    """What the processes of one launch have in common with each other, and with no earlier launch."""
    environment = [os.environ.get(name, "") for name in LAUNCH]
    # By default these variables are the same in every launch; on one machine the launcher's process tells them apart.
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return json.dumps([*environment, lock.owner(os.getppid()) if is_one_machine else None])


def _await_job(own: Plan, planned: Planned) -> dict[str, Any]:
    """The job that the main process of this launch has written."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        work = own.store.work_folders(own.recipe.name, planned.name, planned.fingerprint)
        mark = _launch_file(work)
        if mark.exists() and mark.read_text(encoding="utf-8") == _launch():
            job: dict[str, Any] = files.read_json(work.job)
            return job
        time.sleep(runner.POLL_S)
    raise Fault(f"the main process did not begin the attempt within {WAIT_S:.0f} s", file=own.store.root)


def _shown(work: Work, display: Display, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call a stage while a thread shows its events."""
    tail, ended = events.Tail(work.events), threading.Event()

    def show() -> None:
        while not ended.wait(runner.POLL_S):
            for event in tail.read():
                display.event(work.stage, event)
            display.tick()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        return call()
    finally:
        ended.set()
        thread.join()
