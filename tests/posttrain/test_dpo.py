import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cordee.chat import formats
from cordee.cost import Cost
from cordee.errors import Fault, Stopped, UserError
from cordee.stage import Context
from posttrain import adapters, dpo
from posttrain.settings import BYTES_PER_TOKEN

ANSWERS = ("German", "French", "Italian", "Romansh")
ROOT = Path(__file__).parents[2]


def pair(number: int) -> dict[str, Any]:
    """A question with a right and a wrong answer."""
    question = f"Which language is this? {'Tuots umans naschan libers. ' * (1 + number % 3)}{number}"
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": ANSWERS[number % 2]}],
        "rejected": [{"role": "assistant", "content": ANSWERS[2 + number % 2]}],
    }


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [pair(number) for number in range(24)]
    file = tmp_path_factory.mktemp("pairs") / "preferences.parquet"
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")}), file)
    return file


@pytest.fixture
def new_context(tmp_path: Path) -> Callable[[str], Context]:
    """A context by name, in a folder as a recipe's run has it."""

    def make(name: str) -> Context:
        out, logs = tmp_path / f"{name}@1.partial", tmp_path / "logs" / name
        out.mkdir(exist_ok=True)
        logs.mkdir(parents=True, exist_ok=True)
        return Context(out=out, seed=3, events=logs / "events.jsonl")

    return make


def config(model: Path, data: Path, **changes: Any) -> dpo.Config:
    """Six steps of eight pairs."""
    trainer = {"learning_rate": 5e-3, "num_train_epochs": 2, "max_length": 128, "bf16": False}
    values = {
        "model": str(model),
        "data": [{"path": str(data)}],
        "global_batch_size": 8,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": [3, 5],
        "resume_steps": 2,
        "lora": {"r": 4, "lora_alpha": 8},
        **changes,
        "trainer": {**trainer, **changes.get("trainer", {})},
    }
    return dpo.Config.model_validate(values)


def metrics_of(context: Context) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (context.out / "metrics.jsonl").read_text().splitlines()]


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
        *("metrics.jsonl", "tokenizer.json", "tokenizer_config.json", "training.json"),
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
    @dataclass(frozen=True)
    class StopsAfter(Context):
        calls: list[int] = field(default_factory=list)

        def stop_requested(self) -> bool:
            self.calls.append(1)
            return len(self.calls) >= 3

    whole, broken = new_context("whole"), new_context("broken")
    dpo.run(config(model_folder, pairs_file), whole)
    with pytest.raises(Stopped, match="step 3 of 6"):
        dpo.run(config(model_folder, pairs_file), StopsAfter(broken.out, broken.seed, broken.events))
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

    monkeypatch.setattr("posttrain.adapters.save", kill)
    with pytest.raises(KeyboardInterrupt):
        dpo.run(config(model_folder, pairs_file), broken)
    monkeypatch.undo()
    assert (broken.out / "resume" / "checkpoint-4").is_dir()
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


def test_reference_log_probabilities_computed_beforehand_give_the_same_training(
    model_folder: Path, pairs_file: Path, new_context: Callable[[str], Context]
) -> None:
    plain, before = new_context("plain"), new_context("before")
    dpo.run(config(model_folder, pairs_file), plain)
    dpo.run(config(model_folder, pairs_file, trainer={"precompute_ref_log_probs": True}), before)
    for one, two in zip(metrics_of(plain), metrics_of(before), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert not (before.out / "resume").exists()


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
def test_trl_computes_the_loss_that_was_asked_for(
    model_folder: Path, pairs_file: Path, context: Context, loss_type: str, beta: float, loss_of: Callable[..., float]
) -> None:
    """By hand: log-ratios of each side from two separate scorings, then the paper's formula, pair by pair."""
    import torch

    from cordee.compute.logprobs import score

    asked = config(model_folder, pairs_file, trainer={"loss_type": [loss_type], "beta": beta})
    trainer, _ = dpo.build(asked, context)
    generator = torch.Generator().manual_seed(5)
    for name, weights in trainer.model.named_parameters():
        if "lora_B" in name:
            weights.data = torch.randn(weights.shape, generator=generator) * 0.3
    batch = list(trainer.train_dataset.select(range(4)))
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(batch)).item()

    def sums(side: str) -> list[float]:
        found = score(trainer.model, [row["prompt_ids"] + row[side] for row in batch])
        return [
            scores.logprobs[len(row["prompt_ids"]) - 1 :].double().sum().item()
            for scores, row in zip(found, batch, strict=True)
        ]

    policy = [sums("chosen_ids"), sums("rejected_ids")]
    with trainer.model.disable_adapter():
        reference = [sums("chosen_ids"), sums("rejected_ids")]
    expected = [
        loss_of(
            policy[0][n] - reference[0][n],
            policy[1][n] - reference[1][n],
            (len(batch[n]["chosen_ids"]), len(batch[n]["rejected_ids"])),
        )
        for n in range(4)
    ]
    assert abs(policy[0][0] - reference[0][0]) > 0.01
    assert loss == pytest.approx(sum(expected) / 4, rel=1e-4)


def test_an_adapter_that_does_not_start_without_effect_is_a_fault(
    model_folder: Path, pairs_file: Path, new_context: Callable[[str], Context]
) -> None:
    context = new_context("random")
    asked = config(model_folder, pairs_file, lora={"r": 4, "init_lora_weights": False})
    with pytest.raises(Fault, match="does not start as its reference"):
        dpo.run(asked, context)
    assert not (context.out / "adapter_config.json").exists()


def test_a_dropout_that_trl_would_switch_off_is_refused(model_folder: Path, pairs_file: Path, context: Context) -> None:
    with pytest.raises(UserError, match=r"lora\.lora_dropout: .*disable_dropout"):
        dpo.run(config(model_folder, pairs_file, lora={"r": 4, "lora_dropout": 0.1}), context)


def test_biases_that_would_stay_trained_in_the_reference_are_refused(
    model_folder: Path, pairs_file: Path, context: Context
) -> None:
    with pytest.raises(UserError, match=r"lora\.bias: with 'all' biases stay trained"):
        dpo.run(config(model_folder, pairs_file, lora={"r": 4, "bias": "all"}), context)


def test_a_loss_that_trl_does_not_have_is_refused_by_its_nearest_name(
    model_folder: Path, pairs_file: Path, context: Context
) -> None:
    with pytest.raises(UserError, match=r"trainer\.loss_type: .*did you mean 'sigmoid'"):
        dpo.run(config(model_folder, pairs_file, trainer={"loss_type": ["sigmod"]}), context)


def test_an_adapter_of_rank_0_is_refused(model_folder: Path, pairs_file: Path, context: Context) -> None:
    with pytest.raises(UserError, match="lora: TRL refuses it"):
        dpo.run(config(model_folder, pairs_file, lora={"r": 0}), context)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    import torch

    from posttrain.training import trainable_parameters

    model = torch.nn.Linear(2, 3)
    assert trainable_parameters(model) == 9
    with pytest.raises(UserError, match="nothing to train"):
        trainable_parameters(model.requires_grad_(False))


def test_a_batch_that_the_processes_cannot_share_is_refused(
    model_folder: Path, pairs_file: Path, context: Context
) -> None:
    with pytest.raises(UserError, match="global_batch_size"):
        dpo.run(config(model_folder, pairs_file, global_batch_size=6), context)


def broken(column: str, content: str) -> dict[str, Any]:
    row = pair(1)
    return {**row, column: [{**row[column][0], "content": content}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**pair(1), "rejected": pair(1)["chosen"]}, "are equal"),
        ({**pair(1), "chosen": []}, "chosen is empty"),
        (broken("rejected", "  "), r"an answer has no content \(rejected, message 1\)"),
        ({name: value for name, value in pair(1).items() if name != "rejected"} | {"rejectd": 1}, "mean 'rejectd'"),
        (broken("prompt", "word " * 300), "longer than max_length=128 tokens"),
        (broken("chosen", "German<|assistant_end|>"), "spells out the special token"),
        ({**pair(1), "prompt": [*pair(1)["prompt"], *pair(1)["chosen"]]}, "nothing to answer"),
        ({**pair(1), "chosen": pair(1)["prompt"]}, "ends with 'user'"),
        ({**pair(1), "tools": [{"name": "add"}]}, "has tools, which the chat template does not read"),
        ({**pair(1), "prompt": "What?"}, "no list of messages"),
    ],
)
def test_a_pair_that_would_train_the_wrong_thing_stops_the_run_by_file_and_row(
    model_folder: Path, tmp_path: Path, context: Context, row: dict[str, Any], message: str
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(pair(0)) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message) as error:
        dpo.run(config(model_folder, file), context)
    assert f"{file}: row 2" in str(error.value)
    assert not (context.out / "metrics.jsonl").exists()


def test_a_collator_that_makes_other_batches_than_the_pairs_is_a_fault(
    model_folder: Path, pairs_file: Path, context: Context
) -> None:
    from cordee.chat import pairs
    from cordee.chat.formats import Limits
    from cordee.chat.templates import Template
    from posttrain.dpo_trainer import check_batches

    trainer, _ = dpo.build(config(model_folder, pairs_file), context)
    found = pairs.tokenize(pairs_file, Template(trainer.processing_class), Limits(128, None, 1000), print)
    check_batches(trainer, found)
    sound = trainer.data_collator

    def with_mask(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = sound(examples)
        return {**batch, "completion_mask": batch["attention_mask"]}

    trainer.data_collator = with_mask
    with pytest.raises(Fault, match="row 1: the trainer's batches are not the pairs"):
        check_batches(trainer, found)
    trainer.data_collator = lambda examples: sound([{**row, "chosen_ids": row["chosen_ids"][:-1]} for row in examples])
    with pytest.raises(Fault, match="row 1: the trainer's batches are not the pairs"):
        check_batches(trainer, found)
    trainer.data_collator = sound
    with pytest.raises(Fault, match="the trainer holds 24 of 23 pairs"):
        check_batches(trainer, found[:-1])


def test_pairs_reach_the_trainer_with_their_tools(model_folder: Path, tmp_path: Path, context: Context) -> None:
    """TRL's columns hold what was checked: nothing is rendered a second time."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    template = folder / "chat_template.jinja"
    text = template.read_text().replace("{{- bos_token }}", "{{- bos_token }}{{- tools | tojson if tools else '' }}")
    template.write_text(text)
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds two numbers"}}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({**pair(n), "tools": tools}) + "\n" for n in range(8)))
    trainer, _ = dpo.build(config(folder, file), context)
    assert trainer.train_dataset.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    prompts = trainer.processing_class.batch_decode(list(trainer.train_dataset["prompt_ids"]))
    assert all("Adds two numbers" in prompt for prompt in prompts)


def test_the_cost_counts_two_sequences_a_pair_and_less_memory_for_an_adapter(
    model_folder: Path, pairs_file: Path
) -> None:
    given = {"model": Cost(parameters=1e6, vocab_size=400), "data.0.path": Cost(rows=100)}
    not_made = pairs_file.with_name("not-made.jsonl")
    adapter = dpo.cost(config(model_folder, not_made), given)
    full = dpo.cost(config(model_folder, not_made, lora=None), given)
    assert adapter.tokens == full.tokens == 2 * 100 * 2 * 128
    rows, text_bytes = formats.estimate(pairs_file, ["prompt", "chosen", "rejected"])
    assert rows == pq.read_metadata(pairs_file).num_rows
    own = dpo.cost(config(model_folder, pairs_file), {})
    assert own.parameters > 0
    assert own.tokens == pytest.approx(2 * rows * 2 * min(128, text_bytes / BYTES_PER_TOKEN / rows))
    assert full.flops == pytest.approx(adapter.flops * 8 / 6)
    assert full.memory_bytes - adapter.memory_bytes == pytest.approx(12e6)


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
