import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cordee.compute import resume


def made(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def take_step(model, optimizer, seed):
    model(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model):
    return {name: resume.full(tensor) for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_a_training_goes_on_from_a_point_with_the_same_bits(tmp_path):
    model, optimizer = made(0)
    take_step(model, optimizer, 1)
    resume.save(tmp_path / "resume", {"step": 1, "loss": 0.1}, model, optimizer, writes=True)
    take_step(model, optimizer, 2)
    point, problems = resume.newest(tmp_path / "resume")
    assert (point.state, problems) == ({"step": 1, "loss": 0.1}, [])
    again, its_optimizer = made(9)
    resume.restore(point, again, its_optimizer)
    take_step(again, its_optimizer, 2)
    assert same(whole(model), whole(again))


def test_the_last_two_points_are_kept_and_what_was_being_written_is_no_point(tmp_path):
    model, optimizer = made(0)
    for step in (2, 10, 4):
        resume.save(tmp_path, {"step": step}, model, optimizer, writes=True)
    (tmp_path / ".saving").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdecimal()) == ["10", "4"]
    assert resume.newest(tmp_path)[0].state == {"step": 10}
    assert resume.newest(tmp_path / "none") == (None, [])


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"{}"),
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes()[:-9]),
    ],
)
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_point_is_told_and_dropped(tmp_path, name, damage):
    model, optimizer = made(0)
    for step in (1, 2):
        resume.save(tmp_path, {"step": step}, model, optimizer, writes=True)
    damage(tmp_path / "2" / name)
    point, problems = resume.newest(tmp_path)
    assert point.state == {"step": 1}
    assert len(problems) == 1
    assert problems[0].startswith("the state at step 2 is damaged")
    assert not (tmp_path / "2").exists()


def sharded_process(rank, folder):
    """Save from two shards, and go on in two shards from what one process saved."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, optimizer = made(0)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    assert isinstance(model[0].weight, DTensor)
    point, _ = resume.newest(Path(folder) / "alone")
    resume.restore(point, model, optimizer)
    take_step(model, optimizer, 2)
    resume.save(Path(folder) / "sharded", {"step": 2}, model, optimizer, writes=rank == 0)
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="FSDP2 on the CPU")
def test_a_point_is_the_same_from_shards_and_can_be_put_into_shards(tmp_path):
    model, optimizer = made(0)
    take_step(model, optimizer, 1)
    resume.save(tmp_path / "alone", {"step": 1}, model, optimizer, writes=True)
    take_step(model, optimizer, 2)
    multiprocessing.spawn(sharded_process, (str(tmp_path),), nprocs=2)
    again, its_optimizer = made(9)
    resume.restore(resume.newest(tmp_path / "sharded")[0], again, its_optimizer)
    expected, found = whole(model), whole(again)
    assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)
    take_step(model, optimizer, 3)
    take_step(again, its_optimizer, 3)  # the moments came through as well
    expected, found = whole(model), whole(again)
    assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)
