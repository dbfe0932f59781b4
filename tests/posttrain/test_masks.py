"""What carries loss: every guard over chats, batches and attention is shown the fault that it guards against."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import encoding
import numpy as np
import pytest
import torch
from chat_samples import chat, some_chats, write_lines, write_parquet
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, MambaConfig, PreTrainedConfig

from cordee.chat import conversations, spans
from cordee.chat.conversations import Conversation
from cordee.chat.source import Limits
from cordee.chat.templates import Template
from cordee.errors import Fault, UserError
from cordee.files import read_json
from cordee.stage import Context
from posttrain import prove_masks, sft
from posttrain.training import masks, sft_trainer


@pytest.fixture(scope="module")
def model(model_folder: Path):
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path):
    return AutoTokenizer.from_pretrained(model_folder)


def config(model_folder: Path, *data: Path, **trainer: object) -> sft.Config:
    return sft.Config.model_validate(
        {
            "model": str(model_folder),
            "data": [{"path": str(path)} for path in data],
            "global_batch_size": 4,
            "per_device_train_batch_size": 2,
            "trainer": {"max_length": 128, "max_steps": 2, **trainer},
        }
    )


# --- chats ----------------------------------------------------------------------------------------------------


def tokenized(file: Path, tokenizer, longest: int = 256) -> list[Conversation]:
    return encoding.chats(file, Template(tokenizer), Limits(longest, 512, len(tokenizer)), print)


# --- packing and attention ------------------------------------------------------------------------------------


def packed(tokenizer, tmp_path: Path, lengths: int = 3):
    """One packed row of some chats, collated as the stage does, and the chats."""
    made = tokenized(write_parquet(tmp_path / "m.parquet", some_chats(lengths)), tokenizer, 128)
    lengths_of = [len(chat.ids) for chat in made]
    ids = np.concatenate([chat.ids for chat in made])
    labels = np.where(np.concatenate([chat.has_loss for chat in made]), ids, -100)
    example = {"input_ids": ids.tolist(), "labels": labels.tolist()}
    return sft_trainer.PackedRows(tokenizer.pad_token_id, 2, 512)([{**example, "seq_lengths": lengths_of}]), made


def test_packed_chats_get_the_logits_that_they_get_alone(tmp_path: Path, model, tokenizer) -> None:
    batch, made = packed(tokenizer, tmp_path)
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        start = 0
        for row in made:
            alone = model(input_ids=torch.tensor(row.ids, dtype=torch.long)[None], use_cache=False).logits[0]
            torch.testing.assert_close(together[start : start + len(row.ids)], alone, rtol=0, atol=2e-6)
            start += len(row.ids)


def test_attention_across_packed_chats_is_found(tmp_path: Path, model, tokenizer) -> None:
    batch, _ = packed(tokenizer, tmp_path)
    kept = masks.leak(model, batch, tokenizer.pad_token_id)
    assert kept
    assert kept.other_chats == 0
    assert kept.changed_chat > 0.01
    open_batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}  # switches the block mask off
    leaks = masks.leak(model, open_batch, tokenizer.pad_token_id)
    assert leaks
    assert leaks.other_chats > masks.LEAK_LIMIT


def test_no_label_is_predicted_by_the_chat_before(tmp_path: Path, tokenizer) -> None:
    batch, made = packed(tokenizer, tmp_path)
    starts = np.cumsum([0, *(len(row.ids) for row in made[:-1])])
    assert batch["labels"][0, starts].tolist() == [-100] * len(made)
    assert (batch["labels"] != -100).sum() == sum(row.has_loss.sum() for row in made)


def audit_of(batch, made, tokenizer) -> dict[str, int]:
    found = masks.audit([batch], made, tokenizer.pad_token_id)
    totals: dict[str, int] = {}
    for audit in found.values():
        for name, count in audit.faults.items():
            totals[name] = totals.get(name, 0) + count
    return {name: count for name, count in totals.items() if count}


def test_a_sound_batch_has_no_fault_and_every_chat(tmp_path: Path, tokenizer) -> None:
    batch, made = packed(tokenizer, tmp_path)
    assert audit_of(batch, made, tokenizer) == {}
    (audit,) = masks.audit([batch], made, tokenizer.pad_token_id).values()
    assert audit.chats == audit.packed_with_others == 3
    assert audit.tokens == sum(len(row.ids) for row in made)
    assert audit.loss_tokens == sum(row.has_loss.sum() for row in made)
    assert tokenizer.decode(audit.examples[0][1]) == "German<|assistant_end|>"


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        (lambda batch, _: batch["labels"][0, 2].fill_(7), {"prompt_tokens_with_loss": 1}),
        (lambda batch, end: batch["labels"][0, end].fill_(-100),
         {"ends_of_turn_without_loss": 1, "answer_tokens_without_loss": 1}),
        (lambda batch, _: batch["input_ids"][0, 3].fill_(300), {"chats_not_in_the_data": 1}),
    ],
)  # fmt: skip
def test_a_batch_that_is_not_the_chats_is_found(tmp_path: Path, tokenizer, plant, fault: dict) -> None:
    batch, made = packed(tokenizer, tmp_path)
    plant(batch, made[0].answers[0].until - 1)
    assert audit_of(batch, made, tokenizer) == fault


def test_a_chat_whose_labels_are_all_masked_is_found(tmp_path: Path, tokenizer) -> None:
    batch, made = packed(tokenizer, tmp_path)
    batch["labels"][0, : len(made[0].ids)] = -100
    assert audit_of(batch, made, tokenizer)["chats_without_loss"] == 1


def test_the_stage_stops_before_the_first_step_where_its_collator_is_wrong(
    tmp_path: Path, model_folder: Path, context: Context
) -> None:
    file = write_parquet(tmp_path / "m.parquet", some_chats(12))
    trainer, chats = sft.open_trainer(config(model_folder, file, packing=True), context)
    sound = trainer.data_collator
    sft_trainer.check_batches(trainer, chats)

    def shifted(examples):
        batch = sound(examples)
        return {**batch, "labels": batch["labels"].roll(1, dims=1)}

    trainer.data_collator = shifted
    with pytest.raises(Fault, match="prompt_tokens_with_loss"):
        sft_trainer.check_batches(trainer, chats)

    trainer.data_collator = lambda examples: {**sound(examples), "attention_mask": torch.ones(len(examples), 128)}
    with pytest.raises(UserError, match="packed chats see each other"):
        sft_trainer.check_batches(trainer, chats)


@pytest.mark.parametrize(
    "shape",
    [
        BloomConfig(vocab_size=512, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.5),
        MambaConfig(vocab_size=512, hidden_size=16, state_size=4, num_hidden_layers=2),
    ],
    ids=["alibi", "state space"],
)
def test_a_model_that_cant_be_packed_is_told_by_its_key(
    tmp_path: Path, model_folder: Path, context: Context, shape: PreTrainedConfig
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    file = write_parquet(tmp_path / "m.parquet", some_chats(12))
    with pytest.raises(UserError, match=r"trainer\.packing: packed chats see each other in this .*; packing: false"):
        sft.run(config(folder, file, packing=True), context)


# --- the proof ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_the_certificate_says_what_carries_loss_per_source(
    tmp_path: Path, model_folder: Path, context: Context, packing: bool
) -> None:
    one = write_parquet(tmp_path / "one.parquet", some_chats(10))
    two = write_lines(tmp_path / "two.jsonl", [chat("Hello there", "English"), *some_chats(4)])
    keys = config(model_folder, one, two, packing=packing).model_dump()
    metrics = prove_masks.run(prove_masks.Config.model_validate(keys), context)
    certificate = read_json(context.out / "certificate.json")
    assert all(check["passed"] for check in certificate["checks"])
    names = [check["name"] for check in certificate["checks"]]
    assert "prompt tokens with loss of one.parquet" in names
    assert "ends of turn without loss of two.jsonl" in names
    assert ("largest change in the chats packed behind it" in names) == packing
    seen = {check["name"]: check["value"] for check in certificate["checks"]}
    assert seen["chats in one epoch"] == 15
    assert 0 < metrics["loss_tokens"] < metrics["tokens"]
    for example in certificate["evidence"]:
        assert example["with_loss"].endswith("<|assistant_end|>")
        assert "<|assistant_start|>" in example["prompt"]
    assert {example["source"] for example in certificate["evidence"]} == {"one.parquet", "two.jsonl"}


def test_two_processes_prove_the_batches_of_both(tmp_path: Path, model_folder: Path, context: Context) -> None:
    file = write_parquet(tmp_path / "m.parquet", some_chats(16))
    job = {
        "config": config(model_folder, file, packing=True).model_dump(mode="json"),
        "out": str(context.out),
        "seed": 1,
    }
    (tmp_path / "job.json").write_text(json.dumps({**job, "events": str(context.events)}), encoding="utf-8")
    launch = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    stage = ["-m", "posttrain.prove_masks", "--job", str(tmp_path / "job.json")]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), *stage]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    checks = {check["name"]: check["value"] for check in read_json(context.out / "certificate.json")["checks"]}
    assert checks["chats seen of m.parquet"] == 16
    assert [path.name for path in context.out.iterdir()] == ["certificate.json"]


def test_a_failed_proof_is_a_fault_that_names_the_check(
    tmp_path: Path, model_folder: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "m.parquet", some_chats(12))
    original = sft_trainer.PackedRows.__call__

    def without_ends(self, examples):
        batch = original(self, examples)
        batch["labels"][batch["labels"] == 8] = -100
        return batch

    monkeypatch.setattr(sft_trainer.PackedRows, "__call__", without_ends)
    keys = config(model_folder, file, packing=True).model_dump()
    with pytest.raises(Fault, match=r"ends of turn without loss of m\.parquet is 12"):
        prove_masks.run(prove_masks.Config.model_validate(keys), context)
    assert not (context.out / "certificate.json").exists()


# --- the rows themselves --------------------------------------------------------------------------------------

TOOLS = "{{- bos_token }}{%- if tools %}{{- '<|system_start|>' + tools | tojson + '<|system_end|>' }}{%- endif %}"
CALLS = (
    "{%- for call in message.tool_calls or [] %}{{- call.function.name + (call.function.arguments | tojson) }}"
    "{%- endfor %}{{- message['content'] or '' }}{{- '<|assistant_end|>' }}"
)
ADD = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}


@pytest.fixture
def tools_folder(tmp_path: Path, model_folder: Path) -> Path:
    """The model with a template that knows tools, reasoning aside."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8").replace("{{- bos_token }}", TOOLS)
    text = text.replace("{{- message['content'] + '<|assistant_end|>' }}", CALLS)
    text = text.replace("message['content'] is not string", "false").replace("message['role'] == 'user'",
        "message['role'] in ('user', 'tool')")  # fmt: skip
    template.write_text(text, encoding="utf-8")
    return folder


def tool_rows(count: int) -> list[dict]:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    talks = [
        [{"role": "user", "content": f"1+{n}?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
         {"role": "tool", "content": f"{n + 1}"}, {"role": "assistant", "content": f"It is {n + 1}."},
         {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Sure.", "weight": n % 2}]
        for n in range(count)
    ]  # fmt: skip
    return [{"messages": talk, "tools": json.dumps([ADD])} for talk in talks]


def prove(folder: Path, rows: list[dict], context: Context, packing: bool = True) -> dict[str, float]:
    file = context.out.parent / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")  # with blank lines between
    keys = config(folder, file, packing=packing, max_length=400).model_dump()
    prove_masks.run(prove_masks.Config.model_validate(keys), context)
    checks = read_json(context.out / "certificate.json")["checks"]
    return {check["name"].replace(" of rows.jsonl", ""): check["value"] for check in checks}


@pytest.mark.parametrize("packing", [True, False])
def test_tools_calls_and_flags_of_the_rows_are_proven(tools_folder: Path, context: Context, packing: bool) -> None:
    checks = prove(tools_folder, tool_rows(8), context, packing)
    assert checks["chats in one epoch"] == 8
    for name in ("chats unlike their row", "answers partly without loss", "other texts with loss",
                 "tools not in the prompt", "answers without loss"):  # fmt: skip
        assert checks[name] == 0


@pytest.mark.parametrize(
    ("plant", "problem"),
    [
        (lambda chat: dataclasses.replace(chat, options={}), "chats unlike their row of rows.jsonl is 8"),
        (lambda chat: dataclasses.replace(chat, options={}), "tools not in the prompt of rows.jsonl is 8"),
        (lambda chat: dataclasses.replace(chat, trains=tuple(m["role"] == "assistant" for m in chat.messages)),
         "other texts with loss of rows.jsonl is 4"),
        (lambda chat: dataclasses.replace(chat, trains=(False,) * (len(chat.trains) - 1) + (True,)),
         "; answers without loss of rows.jsonl is 16"),
        (lambda chat: dataclasses.replace(chat, messages=chat.messages[:4], trains=chat.trains[:4]),
         ": answers without loss of rows.jsonl is 4"),
        (lambda chat: dataclasses.replace(chat, messages=[{**m, "content": m.get("content") or "null"}
                                                          for m in chat.messages]), "chats unlike their row"),
    ],
)  # fmt: skip
def test_a_fault_between_file_and_tokens_is_seen_by_the_proof(
    tools_folder: Path, context: Context, monkeypatch: pytest.MonkeyPatch, plant, problem: str
) -> None:
    """The fault stands where chats are read: all that is made of them agrees with it."""
    from cordee.chat import schema

    sound = schema.chat
    monkeypatch.setattr(schema, "chat", lambda *given: plant(sound(*given)))
    with pytest.raises(Fault, match=problem):
        prove(tools_folder, tool_rows(8), context)


@pytest.mark.parametrize("planted", [False, True])
def test_lists_of_text_parts_are_proven_as_their_texts(
    tmp_path: Path, model_folder: Path, context: Context, monkeypatch: pytest.MonkeyPatch, planted: bool
) -> None:
    """Planted: the template is given the list, and writes it as Python does."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8").replace("message['content'] is not string", "false")
    template.write_text(text.replace("message['content'] +", "(message['content'] | trim) +"), encoding="utf-8")
    rows = [
        {"messages": [m | {"content": [{"type": "text", "text": t} for t in m["content"].split("e")]} for m in talk]}
        for talk in some_chats(8)
    ]  # fmt: skip
    if planted:
        monkeypatch.setattr(Template, "readable", lambda _, messages, __: messages)
        monkeypatch.setattr(Template, "require_written", lambda *_: None)
        with pytest.raises(Fault, match=r"chats unlike their row of rows\.jsonl is 8"):
            prove(folder, rows, context, packing=False)
    else:
        assert prove(folder, rows, context, packing=False)["chats in one epoch"] == 8


def test_marks_that_are_not_heeded_are_seen_by_the_proof(
    tools_folder: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault stands where loss is placed: a token too early."""
    sound = spans.loss_mask

    def shifted(*given: object) -> np.ndarray:
        return np.roll(sound(*given), -1)

    monkeypatch.setattr(conversations, "loss_mask", shifted)
    with pytest.raises(Fault) as caught:
        prove(tools_folder, tool_rows(4), context)
    assert "answers partly without loss of rows.jsonl is" in str(caught.value)
    assert "ends of turn without loss of rows.jsonl is" in str(caught.value)
