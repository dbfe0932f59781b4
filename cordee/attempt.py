"""An attempt at a stage: its lock, its folders, the job that its process reads, and what it publishes.

The runner and a stage that is started by hand (`cordee.alone`) both make artifacts through this module only.
"""

import contextlib
import datetime as dt
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee import (
    artifact,
    causes,
    config,
    events,
    files,
    goodput,
    hashes,
    heartbeat,
    identity,
    lock,
    manifest,
    provenance,
)
from cordee.artifact import Artifact, Damaged
from cordee.errors import Fault, UserError
from cordee.lock import Held
from cordee.manifest import Manifest
from cordee.plan import Plan, Planned
from cordee.work import Work


@dataclass(frozen=True)
class Attempt:
    """A stage that is locked and whose job is written: its process may start."""

    work: Work
    job: dict[str, Any]
    """What the process is given, as `job.json` has it."""
    draft: Manifest
    """The manifest, as far as it is known before the stage starts."""
    beside: tuple[str, ...]
    """The names of damaged artifacts of the stage, beside which this one is made."""
    lock: Held

    def announce(self) -> str:
        """What is shown when it begins."""
        beside = f", beside {', '.join(self.beside)}, which can't be used" if self.beside else ""
        return f"starts as {self.draft.recipe}/{self.draft.stage}@{self.work.version}{beside}"

    def publish(self, metrics: dict[str, Any], peak_memory_bytes: int) -> Artifact:
        """Publish what the stage wrote.

        Args:
            metrics: what the stage returned.
            peak_memory_bytes: of the largest process.

        Raises:
            Fault: another run took the stage over.
        """
        self.lock.require()
        goodput.close(self.work, "finished")
        seconds = round(events.worked_s(self.work.events), 3)
        spent = goodput.account(events.read(self.work.events))
        found = {"metrics": metrics, "seconds": seconds, "peak_memory_bytes": peak_memory_bytes, "goodput": spent}
        return artifact.publish(self.work, self.draft.model_copy(update=found))


@contextlib.contextmanager
def begin(
    plan: Plan, planned: Planned, artifacts: Mapping[str, Artifact], proves: str | None = None, *, waits: bool = False
) -> Iterator[Attempt | Artifact]:
    """Lock a stage and prepare its job; an attempt that was interrupted under the same fingerprint is continued.

    Args:
        plan: the recipe's.
        planned: the stage.
        artifacts: those of the stages that are done now, by stage.
        proves: for a proof, the fingerprint of the stage that it examines.
        waits: whether it waits where another run holds the stage, until that one would be known to be gone.

    Yields:
        The attempt, or the artifact where another run has published it since the plan was made.

    Raises:
        UserError: an input is not made yet, or has no such place.
        Fault: another run holds the stage, or an input is not what was published or planned.
    """
    wait_s = lock.DEAD_AFTER_S + 2 * lock.BEAT_S if waits else 0.0
    with lock.hold(plan.store.lock_file(plan.recipe.name, planned.name), wait_s) as held:
        found = plan.store.scan(plan.recipe.name)
        for other in found:
            if isinstance(other, Artifact) and other.fingerprint == planned.fingerprint:
                yield other
                return
        inputs = _verified(plan, planned, artifacts)
        work = plan.store.work_folders(plan.recipe.name, planned.name, planned.fingerprint)
        if work.fingerprint != planned.fingerprint:  # what is there was left by an attempt that has no files
            shutil.rmtree(work.out, ignore_errors=True)
            shutil.rmtree(work.logs, ignore_errors=True)
        work.out.mkdir(parents=True, exist_ok=True)
        job = _write_job(plan, planned, work, inputs)
        unusable = [one for one in found if isinstance(one, Damaged)]
        beside = tuple(one.name for one in unusable if one.is_of(plan.recipe.name, planned.name))
        yield Attempt(work, job, _draft(plan, planned, artifacts, proves), beside, held)


def _verified(plan: Plan, planned: Planned, artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """The path of each input, by its key, after its files were hashed again."""
    paths, kept = {}, hashes.Kept(plan.store.hashes)
    for key, target in planned.inputs.items():
        place = f"stages.{planned.name}.{key}"
        if found := artifacts.get(target.stage) if target.stage else target.artifact:
            path = found.at(target.place, file=plan.recipe.file, key=place)
            if damage := next(artifact.verify(found, target.place), None):
                hint = f"move {found.path} away and run again to make it anew"
                raise Fault(damage, file=plan.recipe.file, key=place, hint=hint)
        elif target.path:
            path = target.path
            if not path.exists() or target.identity != identity.of_path(
                path, hashes.of_content(path, names=target.files)
            ):
                hint = "run again: it is planned anew with what is there now"
                raise Fault(f"{path} changed since the plan was made", file=plan.recipe.file, key=place, hint=hint)
            kept.of(path, target.files)
        else:
            hint = f"run it first: cordee run {plan.recipe.file}"
            raise UserError(f"{target.stage} is not made yet", file=plan.recipe.file, key=place, hint=hint)
        paths[key] = str(path.absolute())  # not resolved: the name of a link tells the kind of file
    kept.save()
    return paths


def _write_job(plan: Plan, planned: Planned, work: Work, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Write the job and the attempt's first event; an earlier attempt's flags and result are removed."""
    work.logs.mkdir(parents=True, exist_ok=True)
    for path in (work.stop, work.save, work.result):
        path.unlink(missing_ok=True)
    job = {
        "uses": planned.item.stage.uses,
        "config": config.resolved(planned.config, inputs),
        "seed": plan.recipe.seed,
        "out": str(work.out.resolve()),
        "events": str(work.events.resolve()),
        "fingerprint": planned.fingerprint,
        "hashes": hashes.known(inputs.values()),
    }
    files.write_json(work.job, job)
    goodput.close(work, "killed", causes.GONE)
    heartbeat.clear(work.logs)
    events.append(work.events, "start")
    return job


def _draft(plan: Plan, planned: Planned, artifacts: Mapping[str, Artifact], proves: str | None) -> Manifest:
    """The manifest before the stage starts: the code and packages that are there now are those that run."""
    return Manifest(
        recipe=plan.recipe.name,
        stage=planned.name,
        version=0,
        uses=planned.item.stage.uses,
        fingerprint=planned.fingerprint,
        identity=planned.identity,
        execution=identity.execution(planned.config),
        inputs=tuple(_reads(planned, artifacts)),
        started=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        metrics={},
        proves=proves,
        seconds=0.0,
        peak_memory_bytes=0,
        files=(),
        **provenance.collect(Path(str(sys.modules[planned.item.stage.uses].__file__))),
    )


def _reads(planned: Planned, artifacts: Mapping[str, Artifact]) -> Iterator[manifest.Read]:
    """The inputs of a stage: artifacts by name and fingerprint, files by path and hash."""
    given = dict(config.inputs(planned.config))
    for key, target in planned.inputs.items():
        if found := artifacts.get(target.stage) if target.stage else target.artifact:
            yield manifest.Read(key=key, artifact=found.name, path=target.place, fingerprint=found.fingerprint)
        else:
            digest = target.identity.removeprefix("content ").partition("/")[0]
            yield manifest.Read(key=key, file=target.source or str(given[key]), sha256=digest)
