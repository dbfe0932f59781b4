"""A lock that works on shared file systems, where flock(2) may do nothing.

The lock is a file, created exclusively. It contains its owner; its modification time is the heartbeat. A lock is dead
if its owner's process on this host has ended, or if the heartbeat of an owner on another host has stopped.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee import machine
from cordee.errors import Fault

BEAT_S = 15.0
DEAD_AFTER_S = 300.0


@dataclass(frozen=True)
class Held:
    """A lock that this process holds."""

    path: Path
    text: str
    """What is in the file: this process."""
    lost: threading.Event
    """Set once a heartbeat found the lock to be another process's."""

    def require(self) -> None:
        """See that the lock is still this process's.

        Raises:
            Fault: another process took it over, since the heartbeat was not seen there for too long.
        """
        if self.lost.is_set() or not _is(self.path, self.text):
            hint = "what this run wrote since is not published; run again once the other one has ended"
            raise Fault("another run took this stage over", file=self.path, hint=hint)


@contextlib.contextmanager
def hold(path: Path, wait_s: float = 0.0) -> Iterator[Held]:
    """Hold a lock for the duration of a `with` block.

    Raises:
        Fault: a live process holds it, and still did after `wait_s` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = Held(path, json.dumps(owner(os.getpid())), threading.Event())
    end = time.monotonic() + wait_s
    while True:
        try:
            _create(path, held.text)
            break
        except Fault:
            if time.monotonic() >= end:
                raise
            time.sleep(1.0)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(held, ended), daemon=True)
    heart.start()
    try:
        yield held
    finally:
        ended.set()
        heart.join()
        if _is(path, held.text):
            path.unlink(missing_ok=True)


def owner(pid: int) -> dict[str, Any]:
    """A process: host, pid and start time, so that a reused pid is told apart."""
    return {"host": platform.node(), "pid": pid, "started": machine.started(pid)}


def is_gone(process: dict[str, Any]) -> bool:
    """Whether a process of this host has ended; False for a process of another host."""
    return bool(process["host"] == platform.node() and machine.started(process["pid"]) != process["started"])


def is_held(path: Path) -> bool:
    """Whether someone who is alive holds a lock."""
    try:
        return not _is_dead(*_state(path))
    except FileNotFoundError:
        return False


def _create(path: Path, mine: str) -> None:
    """Create the lock file; removes the lock of a dead owner once."""
    for attempt in ("first", "after a dead owner"):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            try:
                found = _state(path)
            except FileNotFoundError:  # its owner has just ended
                continue
            if attempt != "first" or not _is_dead(*found):
                raise _held(path) from None
            _take_away(path, found)
            continue
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(mine)
            file.flush()
            os.fsync(file.fileno())
        return
    raise _held(path)


def _state(path: Path) -> tuple[int, str]:
    """The last heartbeat (ns) and the owner of a lock."""
    return path.stat().st_mtime_ns, path.read_text(encoding="utf-8")


def _is_dead(beat_ns: int, text: str) -> bool:
    """Whether a lock's owner has ended."""
    silent_s = time.time() - beat_ns / 1e9
    try:
        process = json.loads(text)
    except json.JSONDecodeError:  # created, and killed before its owner was written
        return silent_s > BEAT_S
    return is_gone(process) or (process["host"] != platform.node() and silent_s > DEAD_AFTER_S)


def _take_away(path: Path, dead: tuple[int, str]) -> None:
    """Remove the lock of a dead owner; if another process has taken it over meanwhile, its lock is put back.

    Raises:
        Fault: another process took it over.
    """
    moved = path.with_name(f"{path.name}.dead.{platform.node()}.{os.getpid()}")
    try:
        path.rename(moved)
        found = _state(moved)
    except FileNotFoundError:  # another process, or `cordee clean`, was faster
        return
    if found != dead:
        moved.rename(path)
        raise _held(path)
    moved.unlink(missing_ok=True)


def _is(path: Path, mine: str) -> bool:
    """Whether a lock still belongs to this owner."""
    try:
        return path.read_text(encoding="utf-8") == mine
    except FileNotFoundError:
        return False


def _held(path: Path) -> Fault:
    """A fault that names the owner of a lock."""
    try:
        process = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {process['pid']} on {process['host']}: "
    except (OSError, json.JSONDecodeError):
        who = ""
    return Fault("another run holds this stage", file=path, hint=f"{who}wait for it, or stop it")


def _beat(held: Held, ended: threading.Event) -> None:
    """Touch the lock's file until the block ends, or the lock is another process's."""
    while not (held.lost.is_set() or ended.wait(BEAT_S)):
        with contextlib.suppress(OSError):  # a shared file system may fail for a moment: the next beat tries again
            if held.path.read_text(encoding="utf-8") == held.text:
                os.utime(held.path)
            else:
                held.lost.set()
