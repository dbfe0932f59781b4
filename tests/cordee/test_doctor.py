"""What a person new to it sees: the first lines, this machine, and what a recipe lacks."""

import json
from pathlib import Path

from cordee import doctor, machine, plan, recipe
from cordee.artifact import Store


def test_without_a_command_three_lines_say_where_to_begin(cordee):
    done = cordee()
    assert done.returncode == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["cordee", "init"], ["cordee", "run"], ["cordee", "--help"],
    ]  # fmt: skip


def test_this_machine_is_told_without_torch(cordee):
    done = cordee("doctor")
    assert done.returncode == 0, done.stderr
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.split()[0] not in ("computes",))
    assert f"{machine.cores()} cores" in told["processor"]
    assert "torch 2." in told["packages"]
    assert "free at" in told["disk"]
    assert machine.fast_precision() in done.stdout


def test_the_memory_that_a_stage_needs_is_compared_with_that_of_the_machine(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": 64,
             "intermediate_size": 128, "num_attention_heads": 2}  # fmt: skip
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    header = json.dumps(
        {"model.layers.0.mlp.up_proj.weight": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4000000]}}
    ).encode()
    (tmp_path / "model" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    stage = {
        "uses": "posttrain.sft",
        "model": str(tmp_path / "model"),
        "data": [{"path": str(tmp_path / "chats.jsonl")}],
    }
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "stages": {"sft": stage}}))
    made = plan.make(recipe.load(Path(tmp_path / "r.yaml"), ()), Store(tmp_path / "runs"))
    assert doctor.lacks(made) == []
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1000)
    ((name, told),) = doctor.lacks(made)
    assert name == "sft"
    assert told.endswith("of memory: a smaller per_device_train_batch_size, or lora")
