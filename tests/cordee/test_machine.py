"""`auto` is resolved before the fingerprint: two machines that compute differently have two identities."""

import subprocess
import sys
from typing import Literal

import pytest

from cordee import config, machine, peek, plan, recipe
from cordee.artifact import Store
from cordee.config import Config, Engine, Precision
from cordee.errors import UserError

FLAGS = "processor\t: 0\nmodel name\t: Example CPU\nflags\t\t: fpu {} sse2\n"


@pytest.fixture
def of_another(monkeypatch, tmp_path):
    """Makes this machine look like another one: its processor's flags, whether it has a GPU and of which capability."""

    def call(flags: str, capability: int | None = None) -> None:
        (tmp_path / "cpuinfo").write_text(FLAGS.format(flags))
        monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(machine, "GPUS", tmp_path if capability else tmp_path / "none")
        monkeypatch.setattr(machine, "_compute_capability", lambda: capability)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        machine.fast_precision.cache_clear()

    yield call
    machine.fast_precision.cache_clear()


def test_this_machine_is_judged_as_torch_judges_it():
    code = """
import torch
found = torch.cpu.get_capabilities()
fast = torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else bool(
    found.get("avx512_bf16") or found.get("amx_bf16"))
print("bfloat16" if fast else "float32")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert machine.fast_precision() == done.stdout.strip()


@pytest.mark.parametrize(
    ("flags", "capability", "expected"),
    [
        ("avx512f", None, "float32"),
        ("avx512_bf16", None, "bfloat16"),
        ("amx_bf16 amx_tile", None, "bfloat16"),
        ("avx512_bf16", 7, "float32"),
        ("avx512f", 9, "bfloat16"),
    ],
)
def test_bfloat16_is_taken_where_the_device_computes_in_it(of_another, flags, capability, expected):
    of_another(flags, capability)
    assert machine.fast_precision() == expected
    assert machine.cpu() == "Example CPU"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_does_not_count(of_another, monkeypatch, hidden):
    of_another("avx512f", 9)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert (machine.has_gpu(), machine.fast_precision()) == (False, "float32")


class Keys(Config):
    """A stage's."""

    precision: Precision = "auto"
    engine: Engine = "auto"
    plain: Literal["auto", "on"] = "auto"


def test_auto_is_gone_once_a_config_is_read(of_another, monkeypatch):
    of_another("avx512_bf16")
    monkeypatch.setattr(peek, "is_installed", lambda _package: False)
    assert Keys().model_dump() == {"precision": "bfloat16", "engine": "transformers", "plain": "auto"}
    monkeypatch.setattr(config.peek, "is_installed", lambda package: package == "vllm")
    asked = Keys(precision="float32", engine="auto")
    assert (asked.precision, asked.engine) == ("float32", "vllm")


@pytest.fixture
def base(write, tmp_path, monkeypatch):
    """Plans a training of a made-up store's tokens."""
    monkeypatch.chdir(tmp_path)
    write("tokens/tokens.json", '{"vocab_size": 100}')
    write("m.yaml", "hidden_size: 8")
    file = write(
        "r.yaml",
        "name: r\nstages: {base: {uses: pretrain.train, model: m.yaml, data: [{tokens: tokens}], max_steps: 2, "
        "global_batch_size: 8, sequence_length: 8, learning_rate: 0.1}}",
    )
    return lambda *overrides: plan.make(recipe.load(file, overrides), Store(tmp_path / "runs")).stage("base")


def test_two_machines_that_compute_differently_have_two_identities(base, of_another):
    of_another("avx512f")
    slow = base()
    of_another("avx512_bf16")
    fast = base()
    assert (slow.identity["config"]["precision"], fast.identity["config"]["precision"]) == ("float32", "bfloat16")
    assert slow.fingerprint != fast.fingerprint
    assert base("base.precision=float32").fingerprint == slow.fingerprint, "auto is what it stands for"
    assert slow.config.precision == "float32", "the stage is told what was planned"


def test_a_gpu_whose_driver_is_silent_is_one_line(base, of_another, monkeypatch):
    silent = machine._compute_capability
    of_another("avx512f", 9)
    monkeypatch.setattr(machine, "_compute_capability", silent)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(f"{name}: not found")))
    with pytest.raises(UserError, match=r"r.yaml: stages.base: the GPU's driver does not tell .* write bfloat16 or"):
        base()
    assert base("base.precision=bfloat16")
