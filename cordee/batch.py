"""A recipe's stages as Slurm jobs: their scripts, and their submission.

A job runs `cordee stage` with the recipe that was stored when it was submitted; what the stage reads is resolved when
the job starts.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml

from cordee import files, jobs, resources, runner
from cordee.cluster import Cluster, Needs, expanded
from cordee.launchers import REQUEUE
from cordee.launchers.slurm import told
from cordee.plan import Plan, Planned
from cordee.stage import CACHE
from cordee.supervisor import RESTARTS


@dataclass(frozen=True)
class Written:
    """A job script that was written and, unless it was only to be written, submitted."""

    stage: str
    script: Path
    after: tuple[str, ...]
    """The jobs, or in a dry run the stages, that have to end well before it starts."""
    number: str | None


def submit(plan: Plan, cluster: Cluster, *, restarts: int = RESTARTS, dry_run: bool = False) -> list[Written]:
    """Write a job script for each stage that is neither done nor in the queue, and submit it.

    Args:
        plan: the recipe's.
        cluster: where it runs.
        restarts: of a stage in its job, without a further step.
        dry_run: whether scripts are written only.

    Raises:
        UserError: a stage asks for what the cluster does not have, or Slurm is not installed.
        Fault: sbatch refuses a job; those before it are submitted.
    """
    needs = {one.name: runner.needs_of(plan, one, cluster) for one in plan.stages}
    queue = {} if dry_run else jobs.queued()
    recipe = runner.keep_recipe(plan).absolute()
    stored = recipe.with_name(recipe.name.replace(".recipe.yaml", ".cluster.yaml"))
    files.write_text(stored, yaml.safe_dump(cluster.model_dump(exclude_defaults=True, exclude={"template"})))
    numbers: dict[str, str] = {}
    made = []
    for planned in plan.stages:
        if planned.artifact:
            continue
        if found := queue.get(jobs.key_of(plan.store, planned)):
            numbers[planned.name] = found.number
            continue
        script = recipe.with_name(recipe.name.replace(".recipe.yaml", f".{planned.name}.sbatch"))
        files.write_text(script, render(plan, planned, cluster, needs[planned.name], (recipe, stored), restarts))
        after = tuple(dict.fromkeys(numbers.get(name, name) for name in plan.awaited(planned)))
        number = None if dry_run else _sbatch(script, after)
        if number is not None:
            numbers[planned.name] = number
            jobs.add(plan, planned, number)
        made.append(Written(planned.name, script, after, number))
    return made


def render(
    plan: Plan, planned: Planned, cluster: Cluster, needs: Needs, stored: tuple[Path, Path], restarts: int
) -> str:
    """A stage's job script.

    Args:
        plan: the recipe's.
        planned: the stage.
        cluster: where it runs.
        needs: what it takes of that.
        stored: the recipe and the cluster file, as they are kept with the run.
        restarts: without a further step.
    """
    recipe, folder = stored[0], Path.cwd()
    texts: jinja2.BaseLoader = jinja2.PackageLoader("cordee", "launchers")
    if cluster.template:
        texts = jinja2.DictLoader({"job.sbatch.jinja": Path(cluster.template).read_text(encoding="utf-8")})
    environment = jinja2.Environment(  # noqa: S701 - a script, not a page: `quote` escapes
        loader=texts, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = shlex.quote
    cache = {CACHE: str(expanded(cluster.cache))} if cluster.cache else {}
    key = jobs.key_of(plan.store, planned)
    told = [["--runs", str(plan.store.root.absolute())], ["--cluster", str(stored[1])], ["--restarts", str(restarts)]]
    output = str(recipe.with_name(f"{planned.name}.%j.out").absolute()).replace("%", "%%").replace("%%j", "%j")
    return environment.get_template("job.sbatch.jinja").render(
        stage=planned.name,
        recipe=plan.recipe.name,
        options=_options(f"{plan.recipe.name}/{planned.name}", key, cluster, needs, output),
        folder=str(folder),
        cluster=cluster,
        variables={**cluster.variables(), **cache},
        limit_s=resources.seconds(needs.time),
        command=_command([str(recipe), planned.name], told, cluster, needs),
        requeue=REQUEUE,
    )


def _options(name: str, key: str, cluster: Cluster, needs: Needs, output: str) -> list[str]:
    """The options of sbatch, as they stand in the script."""
    given = {
        "job-name": name.replace("/", "-"),
        "comment": key,
        "output": output,
        "open-mode": "append",
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "nodes": needs.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": needs.cores,
        "gpus-per-node": needs.gpus or None,
        "mem": f"{int(needs.memory_gb * 1e9 / 2**20)}M" if needs.memory_gb else None,
        "time": needs.time,
        "signal": f"B:USR1@{max(1, cluster.save_before_s // 2)}",
    }
    told = [f"--{option}={shlex.quote(str(value))}" for option, value in given.items() if value is not None]
    return [*told, "--requeue", "--kill-on-invalid-dep=yes", *cluster.options]


def _command(stage: list[str], told: list[list[str]], cluster: Cluster, needs: Needs) -> list[list[str]]:
    """What the job runs, line by line: `cordee stage`, for one node in the container if there is one.

    On several nodes it runs outside, since it starts the processes by srun, which puts them into the container.
    """
    stage = ["-m", "cordee.cli", "stage", *stage]
    if not cluster.container or needs.nodes > 1:
        return [[cluster.python or sys.executable, *stage], *told]
    folder, inside = Path.cwd(), cluster.container
    options = ["--nodes=1", "--ntasks=1", *([f"--cpus-per-task={needs.cores}"] if needs.cores else [])]
    prefix = inside.prefix(folder, with_gpus=needs.gpus > 0)
    within = [[*options], inside.options(folder), cluster.srun, prefix]
    return [["srun"], *(words for words in within if words), [inside.python, *stage], *told]


def _sbatch(script: Path, after: Sequence[str]) -> str:
    """Submit a script; returns the job's number."""
    dependency = [f"--dependency=afterok:{':'.join(after)}"] if after else []
    return told("sbatch", "--parsable", *dependency, str(script)).strip().partition(";")[0]
