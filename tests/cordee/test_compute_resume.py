import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import distributed, multiprocessing, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cordee import files
from cordee.compute import resume, shards
from cordee.errors import Fault
from cordee.stage import Context

SHARD = "shard-0-of-1.safetensors"
needs_fsdp = pytest.mark.skipif(sys.platform != "linux", reason="FSDP2 on the CPU")


def made(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    model.register_buffer("scale", torch.rand(3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def take_step(model, optimizer, seed):
    model(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def at(folder):
    """A context whose resume points lie in `<folder>/resume`."""
    return Context(out=folder, seed=0, events=folder / "events.jsonl")


def save(folder, model, optimizer, *steps, **told):
    with resume.Saver(at(folder), model, optimizer) as saver:
        for step in steps:
            saver.save({"step": step, **told})


def whole(model):
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_a_training_goes_on_from_a_point_with_the_same_bits(tmp_path):
    model, optimizer = made(0)
    take_step(model, optimizer, 1)
    save(tmp_path, model, optimizer, 1, loss=0.1)
    take_step(model, optimizer, 2)
    point, problems = resume.newest(tmp_path / "resume")
    assert (point.state, problems) == ({"step": 1, "loss": 0.1}, [])
    again, its_optimizer = made(9)
    resume.restore(point, again, its_optimizer)
    take_step(again, its_optimizer, 2)
    assert same(whole(model), whole(again))


def test_what_changes_while_a_point_is_written_is_not_in_it(tmp_path, monkeypatch):
    """The next step waits until its weights are copied, and a buffer that a forward pass changes is copied at once."""
    model, optimizer = made(0)
    take_step(model, optimizer, 1)
    before = whole(model)
    fill = shards.Memory.fill

    def slow(memory, *given):
        time.sleep(0.3)
        fill(memory, *given)

    monkeypatch.setattr(shards.Memory, "fill", slow)
    with resume.Saver(at(tmp_path), model, optimizer) as saver:
        saver.save({"step": 1})
        model.scale.add_(1)  # as a forward pass may
        take_step(model, optimizer, 2)
    again, its_optimizer = made(9)
    resume.restore(resume.newest(tmp_path / "resume")[0], again, its_optimizer)
    assert same(whole(again), before)
    assert not same(whole(model), before)


def test_the_last_two_points_are_kept_and_what_was_being_written_is_no_point(tmp_path):
    model, optimizer = made(0)
    save(tmp_path, model, optimizer, 2, 10, 4)
    (tmp_path / "resume" / ".saving-12").mkdir()
    assert sorted(path.name for path in (tmp_path / "resume").iterdir()) == [".saving-12", "10", "4"]
    assert resume.newest(tmp_path / "resume")[0].state == {"step": 10}
    assert not (tmp_path / "resume" / ".saving-12").exists()
    assert resume.newest(tmp_path / "none") == (None, [])


def test_how_long_a_save_took_and_kept_the_training_waiting_is_told(tmp_path):
    model, optimizer = made(0)
    save(tmp_path, model, optimizer, 2, 4)
    told = [row for row in files.read_json_lines(tmp_path / "events.jsonl") if row["event"] == "saved"]
    assert [row["step"] for row in told] == [2, 4]
    assert all(0 < row["blocked_s"] < 5 and 0 < row["seconds"] < 5 for row in told)


@pytest.mark.parametrize("place", ["step", "save", "wait"])
def test_what_goes_wrong_while_a_point_is_written_ends_the_training(tmp_path, monkeypatch, place):
    def full(_memory, path):
        raise OSError(28, "No space left on device", str(path))

    model, optimizer = made(0)
    take_step(model, optimizer, 1)
    monkeypatch.setattr(shards.Memory, "write", full)
    saver = resume.Saver(at(tmp_path), model, optimizer)
    saver.save({"step": 1})
    saver._thread.shutdown()
    with pytest.raises(Fault, match=r"the resume point can't be written: .*safetensors: no space left on the disk"):
        {"step": lambda: take_step(model, optimizer, 2), "save": lambda: saver.save({"step": 2}), "wait": saver.wait}[
            place
        ]()


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"{}"),
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes()[:-9]),
        lambda file: file.write_bytes(bytes([*file.read_bytes()[:-1], file.read_bytes()[-1] ^ 1])),
    ],
    ids=["other", "missing", "truncated", "flipped"],
)
@pytest.mark.parametrize("name", [SHARD, "state.json"])
def test_a_damaged_point_is_told_and_dropped(tmp_path, name, damage):
    model, optimizer = made(0)
    save(tmp_path, model, optimizer, 1, 2)
    damage(tmp_path / "resume" / "2" / name)
    point, problems = resume.newest(tmp_path / "resume")
    assert point.state == {"step": 1}
    assert len(problems) == 1
    assert problems[0].startswith("the state at step 2 is damaged")
    assert not (tmp_path / "resume" / "2").exists()


def test_a_point_with_a_further_file_is_not_used(tmp_path):
    """A shard of another attempt would be read with its own."""
    model, optimizer = made(0)
    save(tmp_path, model, optimizer, 1, 2)
    point = tmp_path / "resume" / "2"
    (point / "shard-1-of-2.safetensors").write_bytes((point / SHARD).read_bytes())
    found, problems = resume.newest(tmp_path / "resume")
    assert found.step == 1
    assert problems == ["the state at step 2 is damaged (shard-1-of-2.safetensors is no part of it): it is not used"]


def test_a_point_of_another_model_is_refused(tmp_path):
    model, optimizer = made(0)
    save(tmp_path, model, optimizer, 1)
    other = nn.Sequential(nn.Linear(6, 7))
    with pytest.raises(Fault, match=r"0.bias is of shape \[5\], and the model has it of shape \[7\]|0.weight is of"):
        resume.restore(resume.newest(tmp_path / "resume")[0], other, torch.optim.AdamW(other.parameters()))


def test_torchs_own_reader_reads_a_point(tmp_path):
    model, optimizer = made(0)
    take_step(model, optimizer, 1)
    save(tmp_path, model, optimizer, 1)
    again, _ = made(9)
    checkpoint.load(
        given := dict(again.named_parameters()) | {"0.weight/exp_avg": torch.zeros(5, 6)},
        storage_reader=HuggingFaceStorageReader(str(tmp_path / "resume" / "1")),
        no_dist=True,
    )
    assert same({name: given[name] for name in dict(model.named_parameters())}, dict(model.named_parameters()))
    assert given["0.weight/exp_avg"].equal(optimizer.state[model[0].weight]["exp_avg"])


def processes(count, folder, *work):
    multiprocessing.spawn(one_process, (count, str(folder), work), nprocs=count)


def one_process(rank, count, folder, work):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous-{os.getppid()}-{count}-{work[0].__name__}"
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count)
    try:
        for one in work:
            one(rank, Path(folder))
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def sharded(seed, **options):
    model, _ = made(seed)
    fully_shard(model, **options)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def save_sharded(rank, folder):
    """Go on from what one process saved, and save; the second save reuses the first one's memory."""
    del rank
    model, optimizer = sharded(9)
    assert isinstance(model[0].weight, DTensor)
    resume.restore(resume.at(folder / "resume", 1), model, optimizer)
    with resume.Saver(at(folder / "sharded"), model, optimizer) as saver:
        saver.save({"step": 1})
        take_step(model, optimizer, 2)
        with torch.no_grad():
            model(torch.randn(4, 6))  # measured: FSDP2 keeps the outermost module's weights whole
        saver.save({"step": 2})
        take_step(model, optimizer, 3)


def restore_sharded(rank, folder):
    del rank
    model, optimizer = sharded(9)
    resume.restore(resume.at(folder / "sharded" / "resume", 2), model, optimizer)
    save_as(folder / "again", model, optimizer)


def save_as(folder, model, optimizer):
    with resume.Saver(at(folder), model, optimizer) as saver:
        saver.save({"step": 2})


def contents(folder):
    """All tensors of a point, whole, by name."""
    with shards.Reader(sorted(folder.glob("*.safetensors"))) as reader:
        return {name: reader.read_like(name, torch.empty(0)) for name in reader.names}


@needs_fsdp
@pytest.mark.parametrize("count", [2, 4])
def test_a_point_is_the_same_from_shards_and_can_be_put_into_any_number_of_them(tmp_path, count):
    """4 processes hold 5 rows: the last one none. What is restored and saved again has the same bits."""
    model, optimizer = made(0)
    take_step(model, optimizer, 1)
    save(tmp_path, model, optimizer, 1)
    alone = contents(tmp_path / "resume" / "1")
    processes(count, tmp_path, save_sharded)
    there = tmp_path / "sharded" / "resume"
    names = [f"shard-{rank}-of-{count}.safetensors" for rank in range(count)]
    assert sorted(path.name for path in (there / "2").iterdir()) == [*names, "state.json"]
    assert same(contents(there / "1"), alone)
    again, its_optimizer = made(9)
    resume.restore(resume.newest(there)[0], again, its_optimizer)
    take_step(model, optimizer, 2)
    expected, found = whole(model), whole(again)
    assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)
    take_step(model, optimizer, 3)
    take_step(again, its_optimizer, 3)  # the moments came through as well
    expected, found = whole(model), whole(again)
    assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)
    other = 6 - count
    processes(other, tmp_path, restore_sharded)
    assert same(contents(tmp_path / "again" / "resume" / "2"), contents(there / "2"))


@needs_fsdp
def test_each_process_writes_its_own_and_what_all_hold_is_written_once(tmp_path):
    model, optimizer = made(0)
    take_step(model, optimizer, 1)
    save(tmp_path, model, optimizer, 1)
    processes(2, tmp_path, save_sharded)
    found = []
    for path in sorted((tmp_path / "sharded" / "resume" / "1").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            found.append({name: tuple(file.get_slice(name).get_shape()) for name in names})
    assert [one["0.weight"] for one in found] == [(3, 6), (2, 6)]
    assert [one["0.weight/exp_avg"] for one in found] == [(3, 6), (2, 6)]
    assert not {name for name in found[0] if name.endswith("step")} & set(found[1])
    assert ("scale" in found[0]) != ("scale" in found[1])


def save_hybrid(rank, folder):
    del rank
    model, optimizer = sharded(0, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    take_step(model, optimizer, 1)
    save_as(folder / "hybrid", model, optimizer)


def save_replicated(rank, folder):
    del rank
    model, optimizer = made(0)
    take_step(model, optimizer, 1)
    save_as(folder / "replicated", model, optimizer)


@needs_fsdp
@pytest.mark.parametrize(("work", "count"), [(save_hybrid, 4), (save_replicated, 2)])
def test_replicas_share_the_writing_of_what_they_hold_alike(tmp_path, work, count):
    processes(count, tmp_path, work)
    folder = tmp_path / work.__name__.removeprefix("save_") / "resume" / "2"
    model, optimizer = made(0)
    take_step(model, optimizer, 1)
    save(tmp_path, model, optimizer, 1)
    found, expected = contents(folder), contents(tmp_path / "resume" / "1")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found)
    written = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    values = sum(value.numel() * value.element_size() for value in expected.values())
    heads = [8 + int.from_bytes(path.read_bytes()[:8], "little") for path in sorted(folder.glob("*.safetensors"))]
    assert sum(written) - sum(heads) == values
    assert len(written) == count
    assert max(size - head for size, head in zip(written, heads, strict=True)) < 0.75 * values


def fail_in_one(rank, folder):
    model, optimizer = sharded(0)
    if rank == 1:
        write = shards.Memory.write
        shards.Memory.write = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    saver = resume.Saver(at(folder / "failed"), model, optimizer)
    saver.save({"step": 1})
    with pytest.raises(Fault, match="no space left on the disk"):
        saver.wait()
    if rank == 1:
        shards.Memory.write = write
    (folder / f"told-{rank}").touch()


@needs_fsdp
def test_a_process_that_can_not_write_ends_the_training_in_all_of_them(tmp_path):
    processes(2, tmp_path, fail_in_one)
    assert sorted(path.name for path in tmp_path.glob("told-*")) == ["told-0", "told-1"]
    assert resume.newest(tmp_path / "failed" / "resume") == (None, [])


def die_between(rank, folder):
    """Process `die` is killed at its flush number `after`: a file or a folder is whole, and the next is not begun."""
    who, after = json.loads((folder / "die.json").read_text())
    model, optimizer = sharded(0)
    with resume.Saver(at(folder / "killed"), model, optimizer) as saver:
        saver.save({"step": 1})
        saver.wait()
        distributed.barrier()
        if rank == who:
            calls, sync = [], files.sync_folder

            def dies(place):
                calls.append(place)
                if len(calls) == after:
                    os.kill(os.getpid(), 9)
                sync(place)

            files.sync_folder = dies
        take_step(model, optimizer, 1)
        saver.save({"step": 2})
        saver.wait()


@needs_fsdp
@pytest.mark.parametrize(("who", "after", "left"), [(0, 1, 1), (1, 1, 1), (0, 2, 1), (0, 3, 2)])
def test_a_kill_between_any_two_files_leaves_the_point_before_whole(tmp_path, who, after, left):
    """A shard is written; `state.json` is; the folder is renamed: only then is there a new point."""
    (tmp_path / "die.json").write_text(json.dumps([who, after]))
    with pytest.raises(multiprocessing.ProcessExitedException, match="SIGKILL"):
        processes(2, tmp_path, die_between)
    point, problems = resume.newest(tmp_path / "killed" / "resume")
    assert (point.step, problems) == (left, [])
    model, optimizer = made(9)
    resume.restore(point, model, optimizer)
    begun, _ = made(0)
    assert same(whole(model), whole(begun)) == (left == 1)
