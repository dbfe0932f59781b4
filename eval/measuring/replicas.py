"""Several processes that each hold a model on devices of their own, and answer a share of the requests.

They keep their answers where all others do (`answers`), and the process that asked reads them there: what was answered
before one of them failed is not lost.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from cordee import events, machine
from cordee.compute.engine import Settings
from cordee.errors import CordeeError, Fault
from eval.measuring.answers import Asked
from eval.measuring.backends import Models

VISIBLE = "CUDA_VISIBLE_DEVICES"
GRACE_S = 5.0
"""How long a process may take to end by itself."""


class Replicas:
    """The processes; they start with the first request."""

    def __init__(
        self, count: int, settings: Settings, folders: Sequence[Path], *, batch_size: int | str, cache: Path,
        watch: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.count, self.devices, self.watch = count, settings.tensor_parallel_size, watch
        self.arguments = (settings, [Path(folder) for folder in folders], batch_size, cache)
        self.running: list[tuple[Any, Connection]] = []

    def share(self, folder: Path, kind: str, equal: list[list[Any]]) -> None:
        """Have each process answer a share of the requests; equal ones, which are samples, stay together.

        Raises:
            CordeeError: what a process raised.
            Fault: one ended.
        """
        if not self.running:
            self._start()
        waiting: list[Connection] = []
        for at, (_, connection) in enumerate(self.running):
            if own := [request for group in equal[at :: self.count] for request in group]:
                connection.send((Path(folder), kind, own))
                waiting.append(connection)
        while waiting:
            for connection in cast("list[Connection]", wait(waiting)):
                try:
                    told = connection.recv()
                except EOFError as error:
                    raise Fault("a process that answers has ended", hint="the log says why; run it again") from error
                if told is None:
                    waiting.remove(connection)
                elif isinstance(told, int):
                    self.watch(told)
                else:
                    raise events.error_of(told)

    def close(self) -> None:
        """End the processes."""
        for process, connection in self.running:
            connection.close()  # which ends it, unless it is at work
            process.join(GRACE_S)
            process.terminate()
            process.join()
        self.running = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for at in range(self.count):
            own, other = context.Pipe()
            with _visible(at, self.devices):
                process = context.Process(target=_work, args=(other, *self.arguments))
                process.start()
            other.close()
            self.running.append((process, own))


@contextmanager
def _visible(at: int, count: int) -> Iterator[None]:
    """Show `count` of the GPUs, those of the process at this place, to what is started now."""
    before = os.environ.get(VISIBLE)
    known = before.split(",") if before else [str(number) for number in range(len(machine.gpus()))]
    if known:
        os.environ[VISIBLE] = ",".join(known[at * count : (at + 1) * count])
    try:
        yield
    finally:
        if before is not None:
            os.environ[VISIBLE] = before
        else:
            os.environ.pop(VISIBLE, None)


def _work(connection: Connection, settings: Settings, folders: list[Path], batch_size: int | str, cache: Path) -> None:
    """Answer until nobody asks any more: a number says how many requests come next, None that a share is done."""
    machine.die_with_parent()
    models = Models(settings, folders, batch_size=batch_size, watch=connection.send)
    asked: Asked | None = None
    while True:
        try:
            folder, kind, requests = connection.recv()
        except EOFError:
            break
        try:
            if asked is None or asked.folder != folder:
                asked = Asked(models, folder, cache)
            asked.ask(kind, requests)
        except CordeeError as error:
            connection.send(events.parts_of(error))
        else:
            connection.send(None)
    models.close()
