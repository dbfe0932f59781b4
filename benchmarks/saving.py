"""How long writing a resume point keeps a training waiting, beside torch's own `dcp.async_save` of the same state.

    python benchmarks/saving.py [--megabytes 90 400] [--processes 2] [--saves 7]

Processes over gloo train a model in FSDP2's shards on the CPU, and save weights and moments every third step, in turns
by `cordee.compute.resume` and by torch. Waiting is what the call takes, and what the next optimizer step waits for the
copy; the median over the saves, in the slowest process. A step with the save is the time to the end of the step that
follows; the medians of both, and of steps without one, tell what the writing takes from the training.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

from cordee.compute import resume
from cordee.stage import Context

WIDTH = 512
ARMS = ("cordee", "torch")


class _Timed(resume.Saver):
    """Tells what a save has kept the training waiting for so far."""

    @property
    def blocked_s(self) -> float:
        return self._blocked_s


def main() -> None:
    """Run the processes and print a line per size and arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[90, 400], help="of weights and moments")
    parser.add_argument("--processes", type=int, default=2, help="how many share them")
    parser.add_argument("--saves", type=int, default=7, help="by each arm")
    asked = parser.parse_args()
    print("   MB  arm      waits ms  step ms  step with a save ms  written s")
    for megabytes in asked.megabytes:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            given = (asked.processes, folder, megabytes, asked.saves)
            multiprocessing.spawn(_process, given, nprocs=asked.processes)
            found = [json.loads(path.read_text()) for path in Path(folder).glob("told-*.json")]
        waits = {arm: max(statistics.median(one[arm]["waits"]) for one in found) * 1e3 for arm in ARMS}
        for arm in ARMS:
            plain, saved, written = (
                max(statistics.median(one[arm][name]) for one in found) for name in ("plain", "saved", "written")
            )
            print(f"{megabytes:5}  {arm:7}  {waits[arm]:8.1f}  {plain * 1e3:7.0f}  {saved * 1e3:19.0f}  {written:9.2f}")
        print(f"{megabytes:5}  waits for {waits['cordee'] / waits['torch']:.1%} of what torch waits for", flush=True)


def _process(rank: int, count: int, folder: str, megabytes: int, saves: int) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count)
    layers = round(megabytes * 1e6 / 12 / WIDTH**2)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    place = Path(folder)
    group = distributed.new_group(backend="gloo")
    found: dict[str, dict[str, list[float]]] = {
        arm: {name: [] for name in ("waits", "plain", "saved", "written")} for arm in ARMS
    }
    _step(model, optimizer)
    with _Timed(Context(out=place, seed=0, events=place / "events.jsonl"), model, optimizer) as saver:
        for number in range(1, saves + 2):
            for arm in ARMS:
                told = found[arm]
                began = time.perf_counter()
                _step(model, optimizer)
                _step(model, optimizer)
                told["plain"].append((time.perf_counter() - began) / 2)
                distributed.barrier()
                began = time.perf_counter()
                future: Any = None
                if arm == "cordee":
                    saver.save({"step": number})
                else:
                    weights, moments = get_state_dict(model, optimizer)
                    state = {"weights": weights, "moments": moments}
                    called = time.perf_counter()
                    future = checkpoint.async_save(state, checkpoint_id=place / f"dcp-{number}", process_group=group)
                    waits = time.perf_counter() - called
                _step(model, optimizer)
                told["saved"].append(time.perf_counter() - began)
                if arm == "cordee":
                    saver.wait()
                    waits = saver.blocked_s
                else:
                    future.result()
                told["waits"].append(waits)
                told["written"].append(time.perf_counter() - began)
                distributed.barrier()
    for told in found.values():
        del told["waits"][0], told["plain"][0], told["saved"][0], told["written"][0]  # the first one warms up
    (place / f"told-{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(64, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main()
