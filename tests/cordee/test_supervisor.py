"""When a job is restarted, and what is said where it is not; with real processes in tests/system/test_supervisor.py."""

import pytest

from cordee import advice, files, plan, recipe, units
from cordee.artifact import Store
from cordee.causes import Cause
from cordee.supervisor import LONGEST_WAIT_S, Restarts

KILLED, HANG, OOM = Cause("killed", "x"), Cause("hang", "x"), Cause("out of memory", "x")


def test_each_restart_without_a_further_step_waits_longer_and_then_there_is_none():
    restarts = Restarts(3)
    assert [restarts.after(KILLED, 0, 0)[0] for _ in range(3)] == [1, 2, 4]
    assert restarts.after(KILLED, 0, 0) == (-1, "it was restarted 3 times and came no further")


def test_a_run_that_comes_further_each_time_is_restarted_for_ever():
    restarts = Restarts(1)
    assert {restarts.after(KILLED, step, 10)[0] for step in range(10, 1000, 10)} == {1}
    assert Restarts(100).after(KILLED, 0, 0)[0] == 1
    restarts = Restarts(100)
    assert max(restarts.after(KILLED, 0, 0)[0] for _ in range(100)) == LONGEST_WAIT_S


def test_the_same_failure_at_the_same_step_twice_is_enough():
    restarts = Restarts(3)
    assert restarts.after(HANG, 50, 50)[0] == 1
    assert restarts.after(KILLED, 45, 5)[0] == 2
    assert restarts.after(HANG, 45, 5)[0] == 4
    assert restarts.after(HANG, 45, 5) == (-1, "the same happened at step 45 before")


def test_what_a_restart_does_not_mend_is_not_restarted():
    assert Restarts(3).after(OOM, 5, 5) == (-1, "")
    assert Restarts(0).after(KILLED, 5, 5) == (-1, "")


def test_a_folder_that_can_not_be_written_is_seen(tmp_path):
    assert files.can_write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not files.can_write(tmp_path / "gone")


PRETRAIN = """
name: r
stages:
  base: {uses: pretrain.train, model: m.yaml, data: [{tokens: tokens}], max_steps: 9, global_batch_size: 32,
         per_device_train_batch_size: ROWS, activation_checkpointing: MODE, sequence_length: 2048, learning_rate: 0.001}
"""


@pytest.mark.parametrize(("rows", "mode", "count"), [(8, "none", 2), (1, "none", 1), (1, "full", 0)])
def test_out_of_memory_names_the_key_and_what_it_saves(write, tmp_path, monkeypatch, rows, mode, count):
    monkeypatch.chdir(tmp_path)
    shape = "hidden_size: 512, intermediate_size: 2048, num_hidden_layers: 8, num_attention_heads: 8"
    write("m.yaml", f"{{{shape}, num_key_value_heads: 8, vocab_size: 32000}}")
    write("tokens/tokens.json", '{"vocab_size": 32000}')
    planned = plan.make(
        recipe.load(write("r.yaml", PRETRAIN.replace("ROWS", str(rows)).replace("MODE", mode))),
        Store(tmp_path / "runs"),
    )
    (base,) = planned.stages
    told = advice.on_memory(base.config, base.cost, base.estimate)

    lines = []
    for key, changes, effect in (
        ("per_device_train_batch_size=4 instead of 8", {"per_device_train_batch_size": 4}, "the result is the same"),
        ("activation_checkpointing=full", {"activation_checkpointing": "full"},
         "a step takes about a third longer; selective saves less"),
    ):  # fmt: skip
        saved = base.cost.memory_bytes - base.estimate(changes).memory_bytes
        if saved > advice.LEAST * base.cost.memory_bytes:
            lines.append(f"{key} saves {units.size(saved)} ({effect})")
    needed = f"of {base.cost.memory_bytes / 1e9:.3g} GB that one process needs, "
    assert told == (needed + ", ".join(lines) if lines else "give it more memory, or less to work on at once")
    assert len(lines) == count
