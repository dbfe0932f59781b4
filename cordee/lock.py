"""A lock that holds on shared file systems, where flock(2) may do nothing.

The lock is a file that only one process can create; inside stand its owner and a heartbeat (the file's time).
A lock is dead when its owner's process is gone from this host, or when its heartbeat stopped on another.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cordee.errors import Fault

BEAT_S = 15.0
DEAD_AFTER_S = 300.0


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold a lock for the length of a `with` block.

    Raises:
        Fault: someone else, alive, holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _create(path)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        path.unlink(missing_ok=True)


def _create(path: Path) -> None:
    """Create the lock's file, taking a dead owner's place once."""
    owner = {"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid())}
    for attempt in ("first", "after a dead owner"):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            if attempt != "first" or not _is_dead(path):
                raise Fault("another run holds this stage", file=path, hint=_holder(path)) from None
            # Of several that find it dead, one wins the rename; the others meet the winner's new file.
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_name(f"{path.name}.dead.{os.getpid()}"))
            path.with_name(f"{path.name}.dead.{os.getpid()}").unlink(missing_ok=True)
            continue
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(owner, file)
            file.flush()
            os.fsync(file.fileno())
        return


def _is_dead(path: Path) -> bool:
    """Whether a lock's owner is gone."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        age_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return True
    except json.JSONDecodeError:  # created, and killed before its owner was written
        return time.time() - path.stat().st_mtime > BEAT_S
    if owner["host"] == platform.node():
        return bool(_started(owner["pid"]) != owner["started"])
    return age_s > DEAD_AFTER_S


def _holder(path: Path) -> str:
    """Who holds a lock, for a person."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}: wait for it, or stop it"
    except (OSError, json.JSONDecodeError):
        return "wait for it, or stop it"


def _started(pid: int) -> str | None:
    """When a process of this host was started (in clock ticks since boot), None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _beat(path: Path, ended: threading.Event) -> None:
    """Touch the lock's file until the block ends."""
    while not ended.wait(BEAT_S):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
