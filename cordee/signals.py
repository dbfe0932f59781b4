"""The signals by which a run is asked to end."""

import contextlib
import os
import signal
from collections.abc import Iterator

from cordee.stage import DEADLINE


@contextlib.contextmanager
def as_interrupts() -> Iterator[None]:
    """SIGTERM and the end of the terminal (SIGHUP) end a run as Ctrl-C does; under nohup(1) it continues.

    So does SIGUSR1, by which Slurm tells a job that its time is over. Further ones count for nothing: Slurm and the
    job's script both send SIGTERM, and only who presses Ctrl-C again wants it to end at once.
    """
    seen: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        if number == signal.SIGUSR1:
            os.environ[DEADLINE] = "0"
        seen.append(number)
        if len(seen) == 1:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
