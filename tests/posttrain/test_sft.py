"""Supervised fine-tuning: its one gradient, however a batch is split, and what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import encoding
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chat_samples import some_chats, write_parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from cordee.compute.model import sequence_limits
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.files import read_json, read_json_lines
from cordee.stage import Context
from posttrain import sft
from posttrain.training import skeleton
from posttrain.training.cost import BYTES_PER_TOKEN

ROWS, PACKED_ROWS = 8, 3


def keys(model_folder: Path, data: Path, **trainer: Any) -> dict[str, Any]:
    """One step of plain gradient descent over all rows: the new weights show the gradient."""
    return {
        "model": str(model_folder),
        "data": [{"path": str(data)}],
        "global_batch_size": ROWS,
        "per_device_train_batch_size": ROWS,
        "trainer": {
            "bf16": False,
            "max_length": 128,
            "num_train_epochs": 1,
            "optim": "sgd",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            **trainer,
        },
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def reference(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Loss and gradient in float64: each chat alone, sum over answer tokens, divided once by their number."""
    data = write_parquet(tmp_path_factory.mktemp("data") / "messages.parquet", some_chats(ROWS))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float64")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in encoding.chats(data, tokenizer, sequence_limits(model, 128)):
        ids = torch.tensor(row.ids, dtype=torch.long)
        logprobs = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        for place in range(row.answers[0].first, row.answers[0].until):
            total -= logprobs[place - 1, ids[place]]
            count += 1
    loss = total / count
    loss.backward()
    return {
        "data": data,
        "loss": loss.item(),
        "loss_tokens": count,
        "gradient": {name: value.grad for name, value in model.named_parameters()},
    }


def assert_is_reference(model_folder: Path, made: Path, reference: dict[str, Any], loss: float) -> None:
    """One step of size 1 moved each weight by the reference's gradient."""
    assert loss == pytest.approx(reference["loss"], rel=1e-5)
    before, after = weights(model_folder), weights(made)
    for name, gradient in reference["gradient"].items():
        torch.testing.assert_close(
            (before[name] - after[name]).double(),
            gradient,
            rtol=2e-3,
            atol=2e-6,
            msg=lambda text, n=name: f"{n}: {text}",
        )


@pytest.mark.parametrize(
    ("per_device", "packing"), [(8, False), (2, False), (1, False), (PACKED_ROWS, True), (1, True)]
)  # one global batch gives one gradient, however it is split
def test_a_global_batch_gives_the_reference_gradient(
    model_folder: Path, reference: dict[str, Any], context: Context, per_device: int, packing: bool
) -> None:
    given = keys(model_folder, reference["data"], packing=packing) | {"per_device_train_batch_size": per_device}
    given |= {"global_batch_size": PACKED_ROWS} if packing else {}
    metrics = sft.run(sft.Config.model_validate(given), context)
    assert metrics["packed_rows"] == given["global_batch_size"]
    assert metrics["steps"] == 1
    assert metrics["rows"] == ROWS
    assert metrics["loss_tokens"] == reference["loss_tokens"]
    assert_is_reference(model_folder, context.out, reference, metrics["loss"])


def test_two_processes_give_the_reference_gradient(
    model_folder: Path, reference: dict[str, Any], tmp_path: Path, context: Context
) -> None:
    given = keys(model_folder, reference["data"])
    job = {"config": {**given, "per_device_train_batch_size": 2}, "out": str(context.out), "seed": 17}
    (tmp_path / "job.json").write_text(json.dumps({**job, "events": str(context.events)}), encoding="utf-8")
    launch = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    stage = ["-m", "posttrain.sft", "--job", str(tmp_path / "job.json")]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), *stage]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = read_json(context.events.parent / "result.json")
    assert metrics["steps"] == 1
    assert_is_reference(model_folder, context.out, reference, metrics["loss"])
    assert [row["step"] for row in read_json_lines(context.out / "metrics.jsonl")] == [1]


def test_only_positions_with_loss_go_through_the_output_head(
    model_folder: Path, reference: dict[str, Any], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.trainer.utils import _ChunkedLogProbFunction

    seen: list[int] = []
    original = _ChunkedLogProbFunction.forward

    def counting(ctx: Any, hidden: torch.Tensor, *rest: Any) -> Any:
        seen.append(hidden.shape[0])
        return original(ctx, hidden, *rest)

    monkeypatch.setattr(_ChunkedLogProbFunction, "forward", counting)
    sft.run(sft.Config.model_validate(keys(model_folder, reference["data"])), context)
    _compared_with_own_logits, *trained = seen
    assert trained == [reference["loss_tokens"]]


def test_it_learns_the_answers_and_leaves_a_plain_model(model_folder: Path, tmp_path: Path, context: Context) -> None:
    data = write_parquet(tmp_path / "messages.parquet", some_chats(60))
    given = keys(model_folder, data)
    given["trainer"] = {"packing": True, "max_length": 256, "learning_rate": 1e-2, "num_train_epochs": 80}
    metrics = sft.run(sft.Config.model_validate(given), context)
    assert metrics["mean_token_accuracy"] > 0.9
    assert metrics["packed_rows"] < metrics["rows"] == 60
    assert sorted(path.name for path in context.out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
        "probe.json",
        "rows.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(context.out), AutoTokenizer.from_pretrained(context.out)
    assert set(model.generation_config.eos_token_id) == {
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|assistant_end|>"),
    }
    question = some_chats(2)[1][:1]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == "French<|assistant_end|>"
    lines = read_json_lines(context.out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, metrics["steps"] + 1))
    assert lines[-1]["tokens"] == metrics["tokens"]
    assert lines[-1]["loss"] < lines[0]["loss"] / 4


def test_an_adapter_is_trained_and_saved_as_in_the_other_stages(
    model_folder: Path, reference: dict[str, Any], context: Context
) -> None:
    from posttrain.training import adapters

    trainer = {"packing": True, "num_train_epochs": 3, "optim": "adamw_torch", "learning_rate": 1e-2}
    given = keys(model_folder, reference["data"], **trainer)
    config = sft.Config.model_validate({**given, "lora": {"r": 4}, "save_steps": 2})
    metrics = sft.run(config, context)
    assert metrics["trainable_parameters"] < metrics["parameters"] / 4
    base, _ = skeleton.open_model(config)
    before = base.get_parameter("lm_head.weight").clone()
    for place in (context.out, context.out / "checkpoints" / "2"):
        opened = adapters.open_adapter(place, skeleton.open_model(config)[0], model_folder)
        merged = opened.merge_and_unload()
        assert merged.get_parameter("lm_head.weight").equal(before)
        changed = merged.get_parameter("model.layers.0.self_attn.q_proj.weight")
        assert not changed.equal(base.get_parameter("model.layers.0.self_attn.q_proj.weight"))
    lines = read_json_lines(context.out / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_weights_of_sources_change_how_often_chats_are_seen(
    model_folder: Path, tmp_path: Path, context: Context
) -> None:
    data = write_parquet(tmp_path / "messages.parquet", some_chats(12))
    given = keys(model_folder, data)
    given["data"] = [{"path": str(data), "weight": 0.5}, {"path": str(data), "weight": 2.0}]
    _, chats = sft.open_trainer(sft.Config.model_validate(given), context)
    assert len(chats) == 6 + 24


@pytest.mark.parametrize(
    ("change", "trainer", "problem"),
    [
        ({"per_device_train_batch_size": 3}, {}, "global_batch_size: 8 rows can't be divided by 3 rows"),
        ({}, {"max_length": None}, "trainer.max_length: must be a number"),
        ({}, {"lr_scheduler_type": "nonsense"}, "trainer: SFTConfig refuses it: nonsense is not"),
        ({}, {"fp16": True, "bf16": True}, "trainer: SFTConfig refuses it"),
    ],
)
def test_a_mistake_in_the_keys_is_named(
    model_folder: Path, reference: dict[str, Any], context: Context, change: dict, trainer: dict, problem: str
) -> None:
    given = {**keys(model_folder, reference["data"], **trainer), **change}
    with pytest.raises(UserError, match=problem):
        sft.run(sft.Config.model_validate(given), context)


def test_a_folder_without_model_or_chat_template_is_named(
    model_folder: Path, reference: dict[str, Any], tmp_path: Path, context: Context
) -> None:
    import shutil

    bare = tmp_path / "bare"
    with pytest.raises(UserError, match=r"model: is no Hugging Face model: it has no config\.json"):
        sft.run(sft.Config.model_validate(keys(tmp_path, reference["data"])), context)
    shutil.copytree(model_folder, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"8 of 8 rows .*is a chat, and the tokenizer has no chat template"):
        sft.run(sft.Config.model_validate(keys(bare, reference["data"])), context)


def test_trainer_keys_that_the_stage_owns_or_trl_lacks_are_refused(tmp_path: Path) -> None:
    from cordee import recipe

    for name in sft.SFT_OWNED:
        with pytest.raises(UserError, match="the stage sets this itself"):
            recipe.validate(sft.Config, keys(tmp_path, tmp_path, **{name: None}), "recipe.yaml", "stages.sft")
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        recipe.validate(sft.Config, keys(tmp_path, tmp_path, learning_rtae=1), "recipe.yaml", "stages.sft")
    owned = set(sft.SFT_OWNED)
    from trl import SFTConfig

    assert owned <= set(SFTConfig.__dataclass_fields__)


def test_cost_counts_the_tokens_of_all_epochs(tmp_path: Path) -> None:
    config = sft.Config.model_validate(keys(tmp_path, tmp_path / "chats.jsonl", num_train_epochs=3))
    given = {"model": Cost(parameters=1e6, vocab_size=8192), "data.0.path": Cost(tokens=1000.0)}
    cost = sft.cost(config, given)
    assert cost.tokens == 3000
    assert cost.flops == pytest.approx(6 * 1e6 * 3000)
    assert sft.cost(config, {"model": Cost()}).tokens is None


@pytest.mark.parametrize(("packing", "in_row"), [(False, 1000 / 50), (True, 128)])
def test_the_cost_of_so_many_steps_does_not_follow_from_the_epochs(
    tmp_path: Path, *, packing: bool, in_row: float
) -> None:
    config = sft.Config.model_validate(keys(tmp_path, tmp_path / "chats.jsonl", max_steps=5, packing=packing))
    given = {"model": Cost(), "data.0.path": Cost(tokens=1000.0, rows=50)}
    assert sft.cost(config, given).tokens == pytest.approx(5 * ROWS * in_row)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_cost_of_a_users_own_model_and_chats_is_near_what_is_trained(
    model_folder: Path, tmp_path: Path, suffix: str
) -> None:
    texts = [" ".join(f"word{number + place}" for place in range(12)) for number in range(400)]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "German"}] for text in texts]
    file = tmp_path / f"chats{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"messages": chats, "other": [[text] for text in texts]}), file)
    else:
        file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    found = sft.cost(sft.Config.model_validate(keys(model_folder, file)), {})
    model, _ = skeleton.open_model(sft.Config.model_validate(keys(model_folder, file)))
    assert found.parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    assert found.vocab_size == model.config.vocab_size
    content = sum(len(text) + len("German") for text in texts)
    assert content / 2 <= found.tokens * BYTES_PER_TOKEN <= content * 2


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("chats.jsonl", b"", "holds no rows"),
        ("chats.jsonl", b'{"message": []}\n', "row 1: can't be told what it is: its columns are 'message'"),
        ("chats.jsonl", b'{"messages": [\n', "data.0.path: can't be read to its end: no JSON in line 2"),
        ("chats.parquet", b"PAR1", "data.0.path: can't be read as Parquet"),
        ("chats.csv", b"messages\n", "holds no rows"),
    ],
)
def test_chats_whose_beginning_is_wrong_stop_the_plan(
    model_folder: Path, tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        sft.cost(sft.Config.model_validate(keys(model_folder, tmp_path / name)), {})
    assert str(caught.value).startswith(f"{tmp_path / name}: {problem}")


def test_rows_of_no_known_shape_stop_no_plan_where_bad_rows_are_dropped(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"x": 1}\n' * 30 + '{"text": "hello"}\n' * 30)
    given = keys(model_folder, file)
    with pytest.raises(UserError, match="can't be told what it is"):
        sft.cost(sft.Config.model_validate(given), {})
    assert sft.cost(sft.Config.model_validate(given | {"bad_rows": "drop"}), {}).tokens


def test_the_stages_can_be_imported_without_torch() -> None:
    code = "import sys, posttrain.sft, posttrain.prove_masks; assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_float32_is_the_default_and_model_init_kwargs_are_heard(model_folder: Path) -> None:
    config = sft.Config.model_validate(keys(model_folder, model_folder))
    assert skeleton.open_model(config)[0].dtype == torch.float32
    chosen = {"dtype": "bfloat16", "attn_implementation": "eager"}
    config = sft.Config.model_validate(keys(model_folder, model_folder, model_init_kwargs=chosen))
    model, _ = skeleton.open_model(config)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
