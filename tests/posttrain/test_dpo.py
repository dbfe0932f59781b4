"""DPO trains, goes on after a stop or a kill, computes the loss that was asked for, and knows its cost."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import trl
from dpo_samples import config, metrics_of
from stopping import StopsAfter

from cordee.cost import Cost
from cordee.data import rows as data
from cordee.errors import Stopped
from cordee.stage import Context
from posttrain import dpo
from posttrain.training import adapters
from posttrain.training.cost import BYTES_PER_TOKEN
from posttrain.training.settings import EPOCHS, MAX_LENGTH

ROOT = Path(__file__).parents[2]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_adapter_starts_at_its_reference_and_learns_to_prefer(
    model_folder: Path, pairs_file: Path, new_context: Callable[[str], Context]
) -> None:
    from safetensors.torch import load_file

    context = new_context("dpo")
    metrics = dpo.run(config(model_folder, pairs_file), context)
    rows = metrics_of(context)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["loss"] < 0.65
    assert rows[-1]["rewards/accuracies"] == 1.0
    assert {"logps/chosen", "logps/rejected", "rewards/margins"} <= set(rows[-1])
    assert metrics["rows"] == 24
    assert metrics["steps"] == 6
    assert metrics["trainable_parameters"] == 4 * 2 * (2 * 128 + 2 * (64 + 32) + 2 * (64 + 128))
    assert metrics["tokens"] == rows[-1]["tokens"]
    assert sorted(path.name for path in context.out.iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "base_model.json", "chat_template.jinja", "checkpoints"),
        *("metrics.jsonl", "rows.json", "tokenizer.json", "tokenizer_config.json", "training.json"),
    ]
    weights = load_file(context.out / "adapter_model.safetensors")
    assert all(weights[name].abs().max() > 0 for name in weights if "lora_B" in name)
    early = load_file(context.out / "checkpoints" / "3" / "adapter_model.safetensors")
    assert early.keys() == weights.keys()
    assert any(not early[name].equal(weights[name]) for name in weights)
    described = json.loads((context.out / "checkpoints" / "3" / "adapter_config.json").read_text())
    base = context.out / "checkpoints" / "3" / described["base_model_name_or_path"]
    assert base.resolve() == model_folder.resolve()


def test_a_stopped_run_goes_on_to_the_same_bits(
    model_folder: Path, pairs_file: Path, new_context: Callable[[str], Context]
) -> None:
    whole, broken = new_context("whole"), new_context("broken")
    dpo.run(config(model_folder, pairs_file), whole)
    with pytest.raises(Stopped, match="step 3 of 6"):
        dpo.run(config(model_folder, pairs_file), StopsAfter(broken.out, broken.seed, broken.events, steps=4))
    assert not (broken.out / "adapter_config.json").exists()
    dpo.run(config(model_folder, pairs_file), broken)
    for name in (
        *("adapter_model.safetensors", "adapter_config.json", "base_model.json"),
        *("checkpoints/3/adapter_model.safetensors", "checkpoints/5/adapter_model.safetensors"),
    ):
        assert (whole.out / name).read_bytes() == (broken.out / name).read_bytes(), name
    assert metrics_of(whole) == metrics_of(broken)


def test_a_run_killed_after_its_last_save_ends_with_the_same_files(
    model_folder: Path, pairs_file: Path, new_context: Callable[[str], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = new_context("whole"), new_context("broken")
    metrics = dpo.run(config(model_folder, pairs_file), whole)
    save = adapters.save

    def kill(model: Any, folder: Path, **rest: Any) -> None:
        if folder == broken.out:
            raise KeyboardInterrupt
        save(model, folder, **rest)

    monkeypatch.setattr("posttrain.training.adapters.save", kill)
    with pytest.raises(KeyboardInterrupt):
        dpo.run(config(model_folder, pairs_file), broken)
    monkeypatch.undo()
    assert (broken.out / "resume" / "4").is_dir()
    again = dpo.run(config(model_folder, pairs_file), broken)
    assert again == metrics
    assert content(broken.out) == content(whole.out)


def test_without_lora_all_weights_are_trained_and_a_whole_model_is_written(
    model_folder: Path, pairs_file: Path, new_context: Callable[[str], Context]
) -> None:
    from cordee.compute.model import open_model

    context = new_context("full")
    metrics = dpo.run(config(model_folder, pairs_file, lora=None, trainer={"learning_rate": 1e-3}), context)
    before, after = open_model(model_folder), open_model(context.out)
    changed = [name for name, value in before.named_parameters() if not value.equal(after.get_parameter(name))]
    assert len(changed) == len(list(before.parameters()))
    assert metrics["trainable_parameters"] == metrics["parameters"] == sum(p.numel() for p in before.parameters())
    assert metrics_of(context)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics_of(context)[-1]["rewards/margins"] > 0.01
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert json_or_text(context.out / name) == json_or_text(model_folder / name)


def json_or_text(path: Path) -> Any:
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()


@pytest.mark.parametrize(
    ("loss_type", "beta", "loss_of"),
    [
        ("sigmoid", 0.3, lambda chosen, rejected, _lengths: -math.log(1 / (1 + math.exp(-0.3 * (chosen - rejected))))),
        ("hinge", 0.7, lambda chosen, rejected, _lengths: max(0.0, 1 - 0.7 * (chosen - rejected))),
        (
            "ipo",
            0.2,
            lambda chosen, rejected, lengths: (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * 0.2)) ** 2,
        ),
    ],
)
def test_the_loss_is_the_one_that_was_asked_for(
    model_folder: Path, pairs_file: Path, context: Context, loss_type: str, beta: float, loss_of: Callable[..., float]
) -> None:
    """By hand: log-ratios of each side from two separate scorings, then the paper's formula, pair by pair."""

    from cordee.compute.logprobs import score

    asked = config(model_folder, pairs_file, trainer={"loss_type": [loss_type], "beta": beta})
    trainer, _ = dpo.build(asked, context)
    generator = torch.Generator().manual_seed(5)
    for name, weights in trainer.model.named_parameters():
        if "lora_B" in name:
            weights.data = (torch.randn(weights.shape, generator=generator) * 0.3).to(weights.device)
    batch = [trainer.train_dataset[at] for at in range(4)]
    inputs = trainer._prepare_inputs(trainer.data_collator(batch))
    loss = trainer.compute_loss(trainer.model, inputs).item()

    def sums(side: int) -> list[float]:
        answers = [tuple(ids.tolist() for ids in row["answers"][side]) for row in batch]
        found = score(trainer.model, [prompt + answer for prompt, answer in answers])
        return [
            scores.logprobs[len(prompt) - 1 :].double().sum().item()
            for scores, (prompt, _) in zip(found, answers, strict=True)
        ]

    policy = [sums(0), sums(1)]
    with trainer.model.disable_adapter():
        reference = [sums(0), sums(1)]
    expected = [
        loss_of(
            policy[0][n] - reference[0][n],
            policy[1][n] - reference[1][n],
            [len(answer) for _, answer in batch[n]["answers"]],
        )
        for n in range(4)
    ]
    assert abs(policy[0][0] - reference[0][0]) > 0.01
    assert loss == pytest.approx(sum(expected) / 4, rel=1e-4)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_key_deterministic_reaches_torch(
    model_folder: Path, pairs_file: Path, context: Context, deterministic: bool
) -> None:

    torch.use_deterministic_algorithms(not deterministic)
    dpo.build(config(model_folder, pairs_file, deterministic=deterministic), context)
    assert torch.are_deterministic_algorithms_enabled() == deterministic


def test_the_cost_counts_two_sequences_a_pair_and_less_memory_for_an_adapter(
    model_folder: Path, pairs_file: Path
) -> None:
    given = {"model": Cost(parameters=1e6, vocab_size=400), "data.0.path": Cost(rows=100)}
    not_made = pairs_file.with_name("not-made.jsonl")
    adapter = dpo.cost(config(model_folder, not_made), given)
    full = dpo.cost(config(model_folder, not_made, lora=None), given)
    assert adapter.tokens == full.tokens == 2 * 100 * 2 * 128
    rows, text_bytes = data.estimate([pairs_file])
    assert rows == pq.read_metadata(pairs_file).num_rows
    own = dpo.cost(config(model_folder, pairs_file), {})
    assert own.parameters > 0
    assert own.tokens == pytest.approx(2 * rows * 2 * min(128, text_bytes / BYTES_PER_TOKEN / rows))
    # two epochs of training, and the reference's forward once
    assert full.flops / adapter.flops == pytest.approx((2 + 2 / 6) / (2 * 4 / 6 + 2 / 6))
    assert full.memory.weights - adapter.memory.weights == -4 * adapter.memory.gradients / 4
    assert full.memory.gradients == full.memory.weights > 10 * adapter.memory.gradients
    assert adapter.memory_bytes < full.memory_bytes


@pytest.mark.parametrize(
    ("trainer", "seen"), [({"num_train_epochs": 2}, 2 * (3 * 100 + 20)), ({"max_steps": 5}, 5 * 8)]
)
def test_the_cost_counts_each_source_as_often_as_its_weight_says(
    model_folder: Path, pairs_file: Path, trainer: dict[str, Any], seen: float
) -> None:
    data = [{"path": str(pairs_file.with_name("a.jsonl")), "weight": 3}, {"path": str(pairs_file.with_name("b.jsonl"))}]
    given = {"model": Cost(parameters=1e6, vocab_size=400), "data.1.path": Cost(rows=20, tokens=800.0)}
    asked = dpo.Config.model_validate(config(model_folder, pairs_file, trainer=trainer).model_dump() | {"data": data})
    known = given | {"data.0.path": Cost(rows=100, tokens=2000.0)}
    assert dpo.cost(asked, known).tokens == pytest.approx(2 * seen * (3 * 2000 + 800) / (3 * 100 + 20))
    if "max_steps" not in trainer:
        assert dpo.cost(asked, given).tokens is None


@pytest.mark.parametrize("kind", [trl.SFTConfig, trl.DPOConfig])
def test_what_a_cost_takes_for_trls_defaults_are_trls(kind: Any) -> None:
    defaults = {known.name: known.default for known in fields(kind)}
    assert (defaults["max_length"], defaults["num_train_epochs"]) == (MAX_LENGTH, EPOCHS)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need a GPU each")
def test_two_processes_train_as_one(
    model_folder: Path, pairs_file: Path, tmp_path: Path, new_context: Callable[[str], Context]
) -> None:
    one, two = new_context("one"), new_context("two")
    asked = config(model_folder, pairs_file)
    dpo.run(asked, one)
    keys = {**asked.model_dump(mode="json"), "launch": {"num_processes": 2}}
    job = {"out": str(two.out), "seed": two.seed, "events": str(two.events), "config": keys}
    (tmp_path / "job.json").write_text(json.dumps(job))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    ended = subprocess.run(
        [*launch, "--rdzv-endpoint=localhost:0", "-m", "posttrain.dpo", "--job", str(tmp_path / "job.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    for alone, together in zip(metrics_of(one), metrics_of(two), strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], abs=2e-3)
    assert (two.out / "adapter_config.json").exists()
