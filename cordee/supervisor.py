"""Supervises a stage's job: notices what hangs or has died, says why it ended, and starts it again where that helps.

A `Supervised` is the handle of a job whatever number of times it has to be started. It polls like any other handle,
and has ended once the job has ended well, was stopped, or has failed in a way that a restart does not mend:

- a user's error, too little memory, a loss that is no number, a full disk: never restarted;
- a process that was killed, a hang, a failed connection or device: restarted from the last resume point, later and
  later. Where the same happens again at the same step, or so many times without a further step, it has failed.
- storage that fails: restarted once a file can be written again.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cordee import causes, events, files, goodput, heartbeat, machine, stage, units
from cordee.causes import Cause, End
from cordee.errors import CordeeError, Stopped
from cordee.heartbeat import Beat
from cordee.launchers import Handle, Job
from cordee.pace import Pace
from cordee.work import Work

RESTARTS = 3
"""Restarts without a further step before a stage has failed."""
WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
"""Before the first restart; twice as long before each that follows without a further step."""
LOOK_S = 0.5
"""How often the heartbeats are read: a file for each process, which may be on a shared file system."""
DEAD_S = 1.5
"""How long the others of a process that has died are given to notice it by themselves."""
TRACE_S = 1.0
"""How long a process is given to write its stacks."""
GONE_S = 10.0
"""How long the processes are given to end that were killed."""
STORAGE_WAIT_S, STORAGE_LOOK_S = 600.0, 5.0
"""How long storage that fails is waited for, and how often it is looked at."""
LOG_BYTES, LOG_LINES = 65536, 200
"""The end of a log that is read for the cause."""


@dataclass
class Restarts:
    """Whether a job that failed is started again, and when."""

    limit: int
    count: int = 0
    """Restarts since it was last further than before."""
    furthest: int = 0
    last: tuple[str, int] | None = None
    """The cause and step of the last failure."""

    def after(self, cause: Cause, step: int, taken: int) -> tuple[float, str]:
        """Seconds until the restart, or a negative number and why there is none.

        Args:
            cause: why it ended.
            step: the last step of all attempts.
            taken: steps that this attempt has taken.
        """
        if not cause.is_transient:
            return -1.0, ""
        before, self.last = self.last, (cause.kind, step)
        if step > self.furthest:
            self.furthest, self.count = step, 0
        elif taken and before == self.last and self.limit:
            return -1.0, f"the same happened at step {step} before"
        if self.count >= self.limit:
            return -1.0, f"it was restarted {self.count} times and came no further" if self.count else ""
        self.count += 1
        return min(LONGEST_WAIT_S, WAIT_S * 2 ** (self.count - 1)), ""


class Supervised:
    """A job that is watched while it runs, and restarted where that helps."""

    def __init__(self, start: Callable[[Job], Handle], job: Job, work: Work, restarts: int = RESTARTS) -> None:
        """Start a job.

        Args:
            start: the launcher's.
            job: what to start.
            work: the stage's folders.
            restarts: without a further step; 0: none.
        """
        self._start, self._job, self._work = start, job, work
        self._restarts = Restarts(restarts)
        self._is_over = False
        """Whether it is not to be started again."""
        self._is_killed = False
        """Whether this run has killed it."""
        self._again_at: float | None = None
        """When it is, where it is not running."""
        self._storage_until: float | None = None
        """Until when its storage is waited for."""
        self._looked_s = 0.0
        """When the heartbeats were last read."""
        self._exit_code: int | None = None
        self.cause = Cause("finished")
        """Why it ended, once it has."""
        self.advice = ""
        """Why it was not restarted."""
        self._begin()

    def poll(self) -> int | None:
        """Its exit code, once it has ended and is not started again; None while it runs or waits."""
        if self._exit_code is not None:
            return self._exit_code
        if self._again_at is not None:
            self._wait()
            return self._exit_code
        exit_code, now = self._handle.poll(), time.monotonic()
        if exit_code is None and now - self._looked_s < LOOK_S:
            return None
        self._looked_s, beats = now, heartbeat.read(self._work.logs)
        if exit_code is not None:
            self._await_gone()
            self._end(self._evidence(exit_code), beats)
        elif not self._is_over and (found := self._look(beats, now)):
            self._end(found, beats)
        return self._exit_code

    def stop(self) -> None:
        """Ask it to save its state and end."""
        self._is_over = True
        if self._again_at is None:
            self._handle.stop()

    def kill(self) -> None:
        """End all of it at once, and wait for that."""
        self._is_over = self._is_killed = True
        if self._again_at is None:
            self._handle.kill()
            self._await_gone()

    def usage(self) -> int:
        """Peak memory of its largest process, in bytes, once it has ended."""
        return self._handle.usage()

    @property
    def errors(self) -> list[CordeeError]:
        """What the processes of the last attempt reported, first what it ended by; a stop only if it was asked for."""
        told = [events.error_of(event) for event in self._tail.seen if event["event"] == "error"]
        told = [error for error in told if self.cause.kind == "stopped" or not isinstance(error, Stopped)]
        return sorted(told, key=lambda error: not " ".join(str(error).split()).startswith(self.cause.text or "\0"))

    def _begin(self) -> None:
        heartbeat.clear(self._work.logs)
        self._pace = Pace()
        self._lacked = False
        """Whether a process that was silent got no core."""
        self._dead_at: dict[int, float] = {}
        """Since when a process is known to be gone, by its number."""
        self._oom_kills = machine.oom_kills()
        log = self._job.log
        self._log_from = log.stat().st_size if log.exists() else 0
        self._tail = events.Tail(self._work.events)
        self._handle: Handle = self._start(self._job)

    def _look(self, beats: list[Beat], now: float) -> End | None:
        """How the job ended, where it hangs or one of its processes has died; it is killed then."""
        if text := self._dead(beats, now):
            self._kill()
            return self._evidence(1, dead=text)
        stopped = {beat.rank for beat in beats if _runs(beat) and machine.is_stopped(beat.pid)}
        text = self._pace.hang(beats, now, stopped)
        if text and self._lacks_cores(beats):
            self._pace.be_patient()
        elif text:
            _trace(beats, self._job.log)
            self._kill()
            return self._evidence(1, hang=text)
        if text := self._pace.slow(beats):
            step = max(beat.step for beat in beats)
            events.append(self._work.events, "incident", kind="straggler", step=step, text=text)
        return None

    def _lacks_cores(self, beats: list[Beat]) -> bool:
        """Whether other processes have the cores, or had them when this was last asked: it is slow, and hangs not."""
        before, self._lacked = self._lacked, any(machine.is_starved(beat.pid) for beat in beats if _runs(beat))
        return before or self._lacked

    def _dead(self, beats: list[Beat], now: float) -> str:
        """A process that has died some time ago without a word."""
        for beat in beats:
            if beat.phase == "end" or not beat.is_here or _runs(beat):
                self._dead_at.pop(beat.pid, None)
            elif now - self._dead_at.setdefault(beat.pid, now) > DEAD_S:
                return f"{beat.who} is gone, in phase {beat.phase} after step {beat.step}"
        return ""

    def _kill(self) -> None:
        """Kill what runs, to start it again."""
        self._handle.kill()
        self._await_gone()

    def _await_gone(self) -> None:
        """Wait until no process of the attempt that was killed can write any more."""
        end, beats = time.monotonic() + GONE_S, heartbeat.read(self._work.logs)
        while time.monotonic() < end and any(_runs(beat) for beat in beats):
            for beat in filter(_runs, beats):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, signal.SIGKILL)
            time.sleep(0.05)

    def _evidence(self, exit_code: int, hang: str = "", dead: str = "") -> End:
        self._tail.read()
        errors = [event for event in self._tail.seen if event["event"] == "error"]
        lines = _last_lines(self._job.log, self._log_from)
        oom_kills, is_full = machine.oom_kills() - self._oom_kills, files.is_full(self._work.out)
        return End(exit_code, errors, lines, oom_kills, hang, dead, self._was_asked(), is_full)

    def _was_asked(self) -> bool:
        """Whether it was asked to stop: by this run, by a colleague, or since its time is over."""
        return self._is_over or self._work.stop.exists() or stage.is_due()

    def _end(self, end: End, beats: list[Beat]) -> None:
        """The job has ended, after these heartbeats: say why, and whether it is started again."""
        self.cause = cause = Cause("stopped") if self._is_killed else causes.of(end)
        goodput.close(self._work, cause.kind, cause.text, beats)
        step, taken = (max((getattr(beat, name) for beat in beats), default=0) for name in ("step", "taken"))
        wait_s, self.advice = self._restarts.after(cause, step, taken)
        if wait_s < 0 or self._was_asked():
            self._exit_code = end.exit_code
            return
        now = time.monotonic()
        self._again_at = now + wait_s
        self._storage_until = now + STORAGE_WAIT_S if cause.kind == "storage" else None
        said = f"{cause.kind}: {cause.text}; is restarted from its last resume point in {units.duration(wait_s)}"
        if self._storage_until:
            said = f"storage: {cause.text}; is restarted once {self._work.out} can be written"
        events.append(self._work.events, "note", text=said)

    def _wait(self) -> None:
        """Start again where it is time, and its storage works."""
        now = time.monotonic()
        if self._is_over:
            self._exit_code, self.cause = Stopped.exit_code, Cause("stopped")
        elif self._again_at is not None and now >= self._again_at:
            if self._storage_until is not None and not files.can_write(self._work.out):
                self._again_at = now + STORAGE_LOOK_S
                if now > self._storage_until:
                    self._exit_code = 1
                    self.advice = f"it failed for {units.duration(STORAGE_WAIT_S)}"
                return
            self._again_at = self._storage_until = None
            for path in (self._work.stop, self._work.save, self._work.result):
                path.unlink(missing_ok=True)
            events.append(self._work.events, "start", restart=True)
            self._begin()


def _runs(beat: Beat) -> bool:
    """Whether a process is one of this machine, and runs."""
    return beat.is_here and machine.started(beat.pid) == beat.started


def _trace(beats: list[Beat], log: Path) -> None:
    """Have each process of this machine write its stacks to the log, one after the other.

    One that is stopped has to continue for it, and one that waits in C may wake up: what they do then does not count,
    since they are killed next.
    """
    for beat in beats:
        if not _runs(beat):
            continue
        with log.open("ab") as file:
            file.write(f"\nstacks of {beat.who}, in phase {beat.phase} after step {beat.step}:\n".encode())
        size, end = log.stat().st_size, time.monotonic() + TRACE_S
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(beat.pid, heartbeat.TRACE)
            os.kill(beat.pid, signal.SIGCONT)
        while time.monotonic() < end and log.stat().st_size == size:
            time.sleep(0.02)
        time.sleep(0.1)  # so that it writes all of them before the next does


def _last_lines(log: Path, start: int) -> list[str]:
    """The last lines that were written to a log from a place on."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - LOG_BYTES))
            return file.read().decode("utf-8", errors="replace").splitlines()[-LOG_LINES:]
    except FileNotFoundError:
        return []
