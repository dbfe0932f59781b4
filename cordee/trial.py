"""A short run of a stage for a proof: started by the product's own launcher, killed at a step or run to its end."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee import events, files, launchers
from cordee.config import Config
from cordee.errors import Fault
from cordee.launchers import Handle, Job, command, local
from cordee.stage import Context
from cordee.work import Work

POLL_S = 0.01


@dataclass(frozen=True)
class Trial:
    """A run that is not published."""

    process: Handle
    work: Work
    context: Context
    """Of the proof, which may be asked to stop."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of its `metrics.jsonl`."""
        return files.read_json_lines(self.work.out / "metrics.jsonl")

    def to_end(self) -> None:
        """Wait for its end.

        Raises:
            Fault: it failed.
            Stopped: the proof was asked to stop.
        """
        while (exit_code := self.process.poll()) is None:
            self._wait()
        if exit_code != 0:
            raise Fault(f"the run for the proof failed: {self._error()}", file=self.work.log)

    def kill_after(self, step: int) -> None:
        """Kill it with SIGKILL as soon as it has logged `step` and written a resume point.

        Raises:
            Fault: it ended before.
            Stopped: the proof was asked to stop.
        """
        while max((row["step"] for row in self.metrics), default=0) < step or not self._has_saved():
            if self.process.poll() is not None:
                raise Fault(f"it ended before it could be killed: {self._error()}", file=self.work.log)
            self._wait()
        self.process.kill()
        if self.work.result.exists():
            raise Fault("it ended before it could be killed", key="steps", hint="raise it")

    def resumed_from(self) -> int:
        """The step from which its last attempt continued; 0 where none did."""
        steps = [event["step"] for event in events.read(self.work.events) if event["event"] == "resumed"]
        return int(steps[-1]) if steps else 0

    def _has_saved(self) -> bool:
        return any(event["event"] == "saved" for event in events.read(self.work.events))

    def _error(self) -> str:
        errors = [event["text"] for event in events.read(self.work.events) if event["event"] == "error"]
        return errors[0] if errors else f"exit code {self.process.poll()}"

    def _wait(self) -> None:
        time.sleep(POLL_S)
        if self.context.stop_requested():
            self.process.kill()
            self.context.stop_if_asked("a proof")


def start(uses: str, config: Config, folder: Path, context: Context) -> Trial:
    """Start a stage, or let it continue what an earlier attempt left in the same folder.

    Args:
        uses: the stage's module.
        config: its keys, with paths in the place of references.
        folder: of the run: its job, events and log, and in `out/` what the stage writes.
        context: of the proof; its seed is the run's too.
    """
    work = Work(folder / "out", folder)
    work.out.mkdir(parents=True, exist_ok=True)
    keys = config.model_dump(mode="json")
    job = {"config": keys, "seed": context.seed, "out": str(work.out), "events": str(work.events)}
    files.write_json(work.job, job)
    argv = command.of_stage(uses, config, work.job)
    one = Job(uses, argv, launchers.environment(), work.log, work.stop)
    return Trial(local.start(one), work, context)
