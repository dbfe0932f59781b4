"""What carries loss: every guard over chats, batches and attention is shown the fault that it guards against."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_samples import chat, make_tokenizer, some_chats, write_lines, write_parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from cordee.errors import Fault, UserError
from cordee.files import read_json
from cordee.stage import Context
from posttrain import masks, prove_masks, rows, sft

GENERATION = re.compile(r"\{%-? generation %\}(.*?)\{%-? endgeneration %\}", re.DOTALL)


@pytest.fixture(scope="module")
def model(model_folder: Path):
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def stops(model, tokenizer) -> rows.Stops:
    return rows.Stops.of(model, tokenizer)


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


# --- rows -----------------------------------------------------------------------------------------------------


def test_each_answer_and_its_end_of_turn_carry_loss_and_nothing_else(tmp_path: Path, tokenizer, stops) -> None:
    talk = [*chat("Was ist das?", "German", system="Be brief."), *chat("Et ça? 你好", "French é")]
    (row,) = rows.tokenize(write_parquet(tmp_path / "m.parquet", [talk]), tokenizer, stops, 256)
    assert tokenizer.decode(row.ids[row.has_loss].tolist()) == "German<|assistant_end|>French é<|assistant_end|>"
    assert np.array_equal(row.has_loss, row.must_have_loss)
    assert np.array_equal(row.labels, np.where(row.has_loss, row.ids, -100))


def test_parquet_and_json_lines_give_the_same_rows(tmp_path: Path, tokenizer, stops) -> None:
    chats = some_chats(5)
    one = rows.tokenize(write_parquet(tmp_path / "m.parquet", chats), tokenizer, stops, 256)
    other = rows.tokenize(write_lines(tmp_path / "m.jsonl", chats), tokenizer, stops, 256)
    assert [row.ids.tolist() for row in one] == [row.ids.tolist() for row in other]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ([{"role": "user", "content": "hello"}], "no assistant turn"),
        ([{"role": "usr", "content": "hello"}], "unknown role 'usr' in message 1; did you mean 'user'"),
        ([], "messages is empty"),
        (chat("hello", ""), "message 2 has no content"),
        (chat("hello <s> there", "German"), "spells out the special token '<s>'"),
        (chat("hello", "German<|assistant_end|>"), r"spells out the special token '<\|assistant_end\|>'"),
        (chat("long " * 200, "German"), "more than trainer.max_length=128"),
        ([{"role": "user"}], "message 1 has no content"),
    ],
)
def test_a_chat_that_would_train_the_wrong_thing_is_named_with_file_and_row(
    tmp_path: Path, tokenizer, stops, bad: list, problem: str
) -> None:
    file = write_lines(tmp_path / "m.jsonl", [*some_chats(3), bad])
    with pytest.raises(UserError, match=problem) as caught:
        rows.tokenize(file, tokenizer, stops, 128)
    assert str(caught.value).startswith(f"{file}: row 4: ")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "holds no rows"),
        ('{"messages": [\n', "line 1 is no JSON"),
        ('{"message": []}\n', "row 1: has no column 'messages'; did you mean 'message'"),
        ('{"messages": "hello"}\n', "row 1: messages is no list"),
    ],
)
def test_a_file_that_holds_no_chats_is_named(tmp_path: Path, tokenizer, stops, content: str, problem: str) -> None:
    (tmp_path / "m.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=problem):
        rows.tokenize(tmp_path / "m.jsonl", tokenizer, stops, 256)


def test_a_parquet_file_without_messages_is_named(tmp_path: Path, tokenizer, stops) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"message": ["x"]}), tmp_path / "m.parquet")
    with pytest.raises(UserError, match="has no column 'messages'"):
        rows.tokenize(tmp_path / "m.parquet", tokenizer, stops, 256)
    with pytest.raises(UserError, match=r"neither \.parquet nor \.jsonl"):
        rows.tokenize(tmp_path / "m.csv", tokenizer, stops, 256)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: GENERATION.sub(r"\1", text), "no token would be trained on"),
        (lambda text: text.replace("+ '<|assistant_end|>' }}", "}}").replace(
            "{%- endgeneration %}", "{%- endgeneration %}{{- '<|assistant_end|>' }}"),
         "end-of-turn token carries no loss"),
        (lambda text: text.replace("{{- '<|assistant_start|>' }}\n        {%- generation %}",
                                   "{%- generation %}{{- '<|assistant_start|>' }}"), "of the prompt carries loss"),
        (lambda text: "{{- bos_token }}" + text, "2 beginning-of-sequence tokens"),
        (lambda text: text.replace("{{- bos_token }}", ""), "0 beginning-of-sequence tokens"),
        (lambda text: text.replace("+ '<|assistant_end|>' }}", "}}"), "no token at which generation stops"),
        (lambda text: text.replace("{%- if add_generation_prompt %}", "{%- if add_generation_prompt %}{{- 'x' }}"),
         "renders message 2 otherwise when more follows"),
    ],
)  # fmt: skip
def test_a_chat_template_that_marks_the_wrong_tokens_is_caught(
    tmp_path: Path, template: str, stops, change, problem: str
) -> None:
    changed = change(template)
    assert changed != template
    make_tokenizer(tmp_path, changed)
    file = write_parquet(tmp_path / "m.parquet", some_chats(2))
    with pytest.raises(UserError, match=problem):
        rows.tokenize(file, AutoTokenizer.from_pretrained(tmp_path), stops, 256)


def test_weights_repeat_rows_and_take_a_random_share(tmp_path: Path, tokenizer, stops) -> None:
    made = rows.tokenize(write_parquet(tmp_path / "m.parquet", some_chats(20)), tokenizer, stops, 256)
    assert [row.number for row in rows.weigh(made, 1.0, 0)] == list(range(1, 21))
    assert len(rows.weigh(made, 2.25, 0)) == 45
    half = [row.number for row in rows.weigh(made, 0.5, 0)]
    assert len(set(half)) == 10
    assert half == [row.number for row in rows.weigh(made, 0.5, 0)]
    assert half != [row.number for row in rows.weigh(made, 0.5, 1)]


# --- packing and attention ------------------------------------------------------------------------------------


def packed(tokenizer, stops, tmp_path: Path, lengths: int = 3):
    """One packed row of some chats, collated as the stage does, and the chats."""
    made = rows.tokenize(write_parquet(tmp_path / "m.parquet", some_chats(lengths)), tokenizer, stops, 128)
    example = {
        "input_ids": np.concatenate([row.ids for row in made]).tolist(),
        "labels": np.concatenate([row.labels for row in made]).tolist(),
        "seq_lengths": [len(row.ids) for row in made],
    }
    return masks.PackedRows(tokenizer.pad_token_id, 512)([example]), made


def test_packed_chats_get_the_logits_that_they_get_alone(tmp_path: Path, model, tokenizer, stops) -> None:
    batch, made = packed(tokenizer, stops, tmp_path)
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        start = 0
        for row in made:
            alone = model(input_ids=torch.tensor(row.ids, dtype=torch.long)[None], use_cache=False).logits[0]
            torch.testing.assert_close(together[start : start + len(row.ids)], alone, rtol=0, atol=2e-6)
            start += len(row.ids)


def test_attention_across_packed_chats_is_found(tmp_path: Path, model, tokenizer, stops) -> None:
    batch, _ = packed(tokenizer, stops, tmp_path)
    kept = masks.leak(model, batch, tokenizer.pad_token_id)
    assert kept
    assert kept.other_chats == 0
    assert kept.changed_chat > 0.01
    open_batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}  # switches the block mask off
    leaks = masks.leak(model, open_batch, tokenizer.pad_token_id)
    assert leaks
    assert leaks.other_chats > masks.LEAK_LIMIT


def test_no_label_is_predicted_by_the_chat_before(tmp_path: Path, tokenizer, stops) -> None:
    batch, made = packed(tokenizer, stops, tmp_path)
    starts = np.cumsum([0, *(len(row.ids) for row in made[:-1])])
    assert batch["labels"][0, starts].tolist() == [-100] * len(made)
    assert (batch["labels"] != -100).sum() == sum(row.has_loss.sum() for row in made)


def audit_of(batch, made, stops, tokenizer) -> dict[str, int]:
    found = masks.audit([batch], made, stops, tokenizer.pad_token_id)
    totals: dict[str, int] = {}
    for audit in found.values():
        for name, count in audit.faults.items():
            totals[name] = totals.get(name, 0) + count
    return {name: count for name, count in totals.items() if count}


def test_a_sound_batch_has_no_fault_and_every_chat(tmp_path: Path, tokenizer, stops) -> None:
    batch, made = packed(tokenizer, stops, tmp_path)
    assert audit_of(batch, made, stops, tokenizer) == {}
    (audit,) = masks.audit([batch], made, stops, tokenizer.pad_token_id).values()
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
        (lambda batch, _: batch["input_ids"][0, 3].fill_(0),
         {"chats_not_in_the_data": 1, "chats_without_exactly_one_begin": 1}),
    ],
)  # fmt: skip
def test_a_batch_that_is_not_the_chats_is_found(tmp_path: Path, tokenizer, stops, plant, fault: dict) -> None:
    batch, made = packed(tokenizer, stops, tmp_path)
    plant(batch, made[0].turns[0][1] - 1)
    assert audit_of(batch, made, stops, tokenizer) == fault


def test_a_chat_whose_labels_are_all_masked_is_found(tmp_path: Path, tokenizer, stops) -> None:
    batch, made = packed(tokenizer, stops, tmp_path)
    batch["labels"][0, : len(made[0].ids)] = -100
    assert audit_of(batch, made, stops, tokenizer)["chats_without_loss"] == 1


def test_the_stage_stops_before_the_first_step_where_its_collator_is_wrong(
    tmp_path: Path, model_folder: Path, context: Context
) -> None:
    file = write_parquet(tmp_path / "m.parquet", some_chats(12))
    trainer, chats, stops = sft.open_trainer(config(model_folder, file, packing=True), context)
    sound = trainer.data_collator
    sft.check_batches(trainer, chats, stops)

    def shifted(examples):
        batch = sound(examples)
        return {**batch, "labels": batch["labels"].roll(1, dims=1)}

    trainer.data_collator = shifted
    with pytest.raises(Fault, match="prompt_tokens_with_loss"):
        sft.check_batches(trainer, chats, stops)

    trainer.data_collator = lambda examples: {**sound(examples), "attention_mask": torch.ones(len(examples), 128)}
    with pytest.raises(Fault, match="packed chats see each other"):
        sft.check_batches(trainer, chats, stops)


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
    assert certificate["passed"]
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
    original = masks.PackedRows.__call__

    def without_ends(self, examples):
        batch = original(self, examples)
        batch["labels"][batch["labels"] == 8] = -100
        return batch

    monkeypatch.setattr(masks.PackedRows, "__call__", without_ends)
    keys = config(model_folder, file, packing=True).model_dump()
    with pytest.raises(Fault, match=r"ends of turn without loss of m\.parquet is 12"):
        prove_masks.run(prove_masks.Config.model_validate(keys), context)
    assert not (context.out / "certificate.json").exists()
