"""What samples for a trainer: transformers, vLLM in its process, or vLLM in a process beside it.

TRL's own server takes new weights over NCCL, between GPUs alone. The process here takes them in memory that both share.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import Trainer

from cordee import machine
from cordee.errors import CordeeError, Fault, UserError
from cordee.events import error_of, parts_of
from posttrain.rollouts import weights
from posttrain.rollouts.with_vllm import Vllm, VllmArguments
from posttrain.training.sampling import Sampled, SamplingSettings

STOP_S = 30.0
"""How long the process beside may take to stop."""


class Colocated:
    """vLLM in the trainer's process."""

    def __init__(self, trainer: Trainer, arguments: VllmArguments) -> None:
        """Start vLLM for a trainer."""
        self.trainer, self.vllm = trainer, Vllm(arguments)

    def sync(self) -> None:
        """Copy the weights that training changes; the first time all."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        self.vllm.load(weights.named(model, changed_only=self.vllm.is_filled))

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: SamplingSettings) -> list[Sampled]:
        """Continue each prompt of token ids `[seq]`, by the seed at its place."""
        return self.vllm.sample(prompts, seeds, how)

    def close(self) -> None:
        """End vLLM."""
        self.vllm.close()


class Beside:
    """vLLM in a process beside the trainers, which the main one of them speaks with."""

    def __init__(self, trainer: Trainer, arguments: VllmArguments) -> None:
        """Start the process, and wait until vLLM runs.

        Raises:
            UserError: there is no GPU for it, or vLLM does not know the model.
            Fault: it has ended.
        """
        self.trainer = trainer
        self.shared: dict[str, torch.Tensor] = {}
        self.is_main = trainer.accelerator.is_main_process
        if self.is_main:
            spawning = torch.multiprocessing.get_context("spawn")
            self.pipe, other = spawning.Pipe()
            self.process = spawning.Process(
                target=_serve, args=(other, arguments, _gpu(arguments.processes)), daemon=True
            )
            self.process.start()
            other.close()
            self._answer()
        trainer.accelerator.wait_for_everyone()

    def sync(self) -> None:
        """Copy the weights that training changes, the first time all, to memory that is shared; then vLLM takes them.

        Every process takes part, since weights may lie in shards.
        """
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        is_first, names = not self.shared, []
        for name, weight in weights.named(model, changed_only=not is_first):
            if self.is_main:
                if is_first:
                    self.shared[name] = torch.empty_like(weight, device="cpu").share_memory_()
                self.shared[name].copy_(weight)
                names.append(name)
        if self.is_main:
            self._ask("load", self.shared if is_first else None, names)

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: SamplingSettings) -> list[Sampled]:
        """Continue each prompt of token ids `[seq]` of this process, by the seed at its place."""
        asked = gather_object(list(zip(prompts, seeds, strict=True)))
        counts = gather_object([len(prompts)])
        found: list[Any] = [None]
        if self.is_main:
            found = [self._ask("sample", [ids for ids, _ in asked], [seed for _, seed in asked], how)]
        broadcast_object_list(found)
        before = sum(counts[: self.trainer.accelerator.process_index])
        return list(found[0][before : before + len(prompts)])

    def close(self) -> None:
        """End the process."""
        if self.is_main:
            self.pipe.close()
            self.process.join(STOP_S)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()

    def _ask(self, what: str, *given: Any) -> Any:
        try:
            self.pipe.send((what, given))
        except OSError as error:
            raise Fault(f"the process of vLLM has ended: {error}", key="vllm_mode") from error
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError as error:
            self.process.join()
            problem = f"the process of vLLM has ended with code {self.process.exitcode}"
            raise Fault(problem, key="vllm_mode", hint="the log says more") from error
        if isinstance(answer, dict) and "exit_code" in answer:
            raise error_of(answer)
        return answer


def _gpu(trainers: int) -> str | None:
    """The GPU of the process beside, as `CUDA_VISIBLE_DEVICES` names it: the first that no trainer uses.

    Raises:
        UserError: there is none.
    """
    if not torch.cuda.is_available():
        return None
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = named.split(",") if named else [str(at) for at in range(torch.cuda.device_count())]
    if len(known) <= trainers:
        problem = f"{trainers} trainers use all of the {len(known)} GPUs"
        raise UserError(problem, key="vllm_mode", hint="colocate, or fewer processes (launch.num_processes)")
    return known[trainers]


def _serve(pipe: Connection, arguments: VllmArguments, gpu: str | None) -> None:
    """What the process beside does: it answers until the other end is closed."""
    machine.die_with_parent()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # those of the trainers
        os.environ.pop(name, None)
    shared: dict[str, torch.Tensor] = {}
    vllm: list[Vllm] = []

    def load(first: dict[str, torch.Tensor] | None, names: list[str]) -> None:
        shared.update(first or {})

        def given() -> Iterator[tuple[str, torch.Tensor]]:
            yield from ((name, shared[name]) for name in names)

        vllm[0].load(given())

    def sample(prompts: list[list[int]], seeds: list[int], how: SamplingSettings) -> list[Sampled]:
        return vllm[0].sample(prompts, seeds, how)

    known: dict[str, Callable[..., Any]] = {"load": load, "sample": sample}
    _reply(pipe, lambda: vllm.append(Vllm(arguments)))
    while True:
        try:
            what, given = pipe.recv()
        except EOFError:
            break
        _reply(pipe, lambda: known[what](*given))  # noqa: B023 - it is called at once
    if vllm:
        vllm[0].close()


def _reply(pipe: Connection, work: Callable[[], Any]) -> None:
    """Send what some work gives, or its error's parts."""
    try:
        answer = work()
    except CordeeError as error:
        answer = parts_of(error)
    except Exception as error:  # noqa: BLE001 - whatever vLLM raises is told by the other process
        answer = parts_of(Fault(f"vLLM: {type(error).__name__}: {error}", key="engine"))
    pipe.send(answer)
