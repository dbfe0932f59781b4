from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch import nn

from cordee import machine
from cordee.compute import device
from cordee.config import Launch
from cordee.errors import Fault, UserError
from cordee.launchers import RUNNER

ACCELERATE = Path(__file__).parents[2] / "configs" / "accelerate"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_accelerator_yet():
    """accelerate's state is one for the process, and tests of trainers leave theirs; so is torch's determinism."""
    AcceleratorState._reset_state(reset_partial_state=True)
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_auto_compiles_a_long_training_and_not_a_short_one():
    assert device.resolve_compile("auto", 1e15, CPU)[0]
    assert not device.resolve_compile("auto", 1e9, CPU)[0]
    assert device.resolve_compile("on", 1e9, CPU) == (True, "as asked")
    assert device.resolve_compile("off", 1e15, CPU) == (False, "as asked")


def test_without_a_compiler_on_is_an_error_and_auto_says_why_not(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda _name: None)
    assert device.resolve_compile("auto", 1e15, CPU) == (False, "this machine has no C++ compiler")
    with pytest.raises(UserError, match=r"compile: this machine has no C\+\+ compiler"):
        device.resolve_compile("on", 1e15, CPU)


@pytest.mark.parametrize(
    ("name", "value"), [("mixed_precision", "bf16"), ("dynamo_config", {"dynamo_backend": "INDUCTOR"})]
)
def test_what_is_the_stages_own_is_refused_in_an_accelerate_configuration(tmp_path, name, value):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"use_cpu": True, name: value}))
    with pytest.raises(UserError, match=f"a.yaml: {name}: precision and compilation are the stage's own"):
        device.open_accelerator(Launch(config_file=str(tmp_path / "a.yaml")))


@pytest.mark.parametrize(("name", "value"), [("MIXED_PRECISION", "bf16"), ("DYNAMO_BACKEND", "INDUCTOR")])
def test_what_is_the_stages_own_is_refused_of_a_persons_own_launch(monkeypatch, name, value):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=f"{name.lower()}: precision and compilation are the stage's own"):
        device.open_accelerator(Launch())


def test_what_would_give_other_bits_when_run_again_is_refused_by_torch():
    device.open_accelerator(Launch())
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def put_twice():
    """Writes two values into one place, which torch has no deterministic algorithm for."""
    return torch.zeros(1).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_the_key_deterministic_turns_deterministic_algorithms_on_and_off():
    for before in (True, False):
        torch.use_deterministic_algorithms(before)
        device.open_accelerator(Launch(), deterministic=False)
        assert not torch.are_deterministic_algorithms_enabled()
        assert put_twice().item() in (1.0, 2.0)
        torch.use_deterministic_algorithms(before)
        device.open_accelerator(Launch(), deterministic=True)
        with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
            put_twice()


def test_the_first_version_of_fsdp_is_refused(tmp_path):
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump({"use_cpu": True, "distributed_type": "FSDP"}))
    with pytest.raises(UserError, match=r"fsdp_config\.fsdp_version: must be 2"):
        device.open_accelerator(Launch(config_file=str(tmp_path / "fsdp.yaml")))


def test_processes_that_do_not_run_are_noticed():
    with pytest.raises(Fault, match=r"launch\.num_processes: 3 processes were asked for, and 1 run"):
        device.open_accelerator(Launch(num_processes=3))


def test_an_accelerator_that_the_launcher_did_not_see_is_no_silent_training_on_the_cpu(monkeypatch):
    """As with ROCm or in WSL2: /proc names no NVIDIA driver, so the generated settings have use_cpu: true."""
    several = Launch(num_processes=2)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv(RUNNER, "{}")
    device.require_launched(several, 2, CPU)
    monkeypatch.setattr(device, "default", lambda: torch.device("cuda"))
    with pytest.raises(
        Fault, match=r"launch.config_file: torch sees cuda, and 2 processes .*=configs/accelerate/gpu.yaml"
    ):
        device.require_launched(several, 2, CPU)
    device.require_launched(Launch(num_processes=2, config_file=str(ACCELERATE / "cpu-2.yaml")), 2, CPU)
    monkeypatch.delenv(RUNNER)
    device.require_launched(several, 2, CPU)  # a person's own `accelerate launch --cpu`


def test_a_sharding_that_was_asked_for_and_does_not_run_is_noticed(tmp_path):
    asked = {"use_cpu": True, "distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(asked))
    launch = Launch(config_file=str(tmp_path / "fsdp.yaml"))
    accelerator = device.open_accelerator(launch)
    with pytest.raises(Fault, match="FSDP was asked for: True, and Linear runs"):
        device.require_wrapped(accelerator.prepare(nn.Linear(2, 2)), 1, launch)


def test_a_model_left_unwrapped_beside_other_processes_is_noticed():
    with pytest.raises(Fault, match="2 processes run, each with a Linear of its own"):
        device.require_wrapped(nn.Linear(2, 2), 2, Launch(num_processes=2))


def test_the_configurations_that_are_shipped_leave_the_stages_keys_to_the_stage():
    found = sorted(ACCELERATE.glob("*.yaml"))
    assert [file.name for file in found] == ["cpu-2.yaml", "cpu.yaml", "fsdp2-nodes.yaml", "fsdp2.yaml", "gpu.yaml"]
    from accelerate.commands.config.config_args import load_config_from_file

    for file in found:
        asked = device._asked(Launch(config_file=str(file)))
        assert (asked.cpu, asked.sharded) == (file.name.startswith("cpu"), file.name.startswith("fsdp2"))
        load_config_from_file(str(file))  # accelerate itself refuses a key that it does not know
