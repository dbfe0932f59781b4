import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cordee.cost import Cost
from cordee.errors import Fault, Stopped, UserError
from pretrain import train

ROOT = Path(__file__).resolve().parents[2]


def rows(out, key):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in found if key in row}


def launch(folder, config_file=None, processes=1):
    """Start the job as the runner does."""
    settings = ["--config_file", str(config_file), "--num_processes", str(processes)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *settings]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*command, "-m", "pretrain.train", "--job", str(folder / "job.json")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_training_publishes_models_that_transformers_opens_and_says_what_it_did(trained):
    out, metrics = trained("a", save_steps=[2, 4], eval_steps=3, max_steps=6)
    for place, step in ((".", 6), ("checkpoints/2", 2), ("checkpoints/4", 4)):
        model = AutoModelForCausalLM.from_pretrained(out / place, dtype="auto")
        assert model.dtype == torch.float32
        assert model.generation_config.eos_token_id == [1, 4]  # </s> and <|assistant_end|>
        assert AutoTokenizer.from_pretrained(out / place).chat_template, step
    assert {path.name for path in out.iterdir()} == {
        *("checkpoints", "config.json", "model.safetensors", "generation_config.json", "tokenizer.json"),
        *(
            "tokenizer_config.json",
            "chat_template.jinja",
            "metrics.jsonl",
            "heldout.json",
            "training.json",
            "probe.json",
        ),
    }
    losses = rows(out, "loss")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[1] == pytest.approx(math.log(512), abs=0.1)  # an untrained model knows nothing
    assert losses[6] < losses[1]
    assert list(rows(out, "heldout_bits_per_byte")) == [3, 6]
    assert rows(out, "learning_rate")[1] == pytest.approx(1.5e-3)
    assert metrics["tokens"] == rows(out, "tokens")[6]
    assert metrics["parameters"] == sum(weights.numel() for weights in model.parameters())
    assert metrics["flops"] == metrics["tokens"] * (6 * metrics["parameters"] + 12 * 2 * 64 * 64)
    assert (metrics["precision"], metrics["compiled"], metrics["data.0.token_share"]) == ("float32", False, 1.0)


@pytest.mark.parametrize(
    ("dropout", "keys"), [(0.0, {}), (0.5, {}), (0.0, {"loss": "goldfish", "goldfish_k": 2, "goldfish_h": 2})]
)
def test_held_out_bits_per_byte_are_those_of_each_document_alone_in_float64(trained, tmp_path, dropout, keys):
    model = (ROOT / "configs/models/apertus-micro.yaml").read_text() + f"attention_dropout: {dropout}\n"
    (tmp_path / "m.yaml").write_text(model)
    out, metrics = trained("a", model=str(tmp_path / "m.yaml"), **keys)
    told = json.loads((out / "heldout.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    tokens = out.parents[1] / "tokens"
    offsets, ids = np.load(tokens / "heldout.offsets.npy"), np.fromfile(tokens / "heldout.bin", "<u2").astype(np.int64)
    documents = [json.loads(line) for line in (tokens / "heldout.documents.jsonl").read_text().splitlines()]
    bits, sizes = {}, {}
    for index, document in enumerate(documents):
        piece = torch.from_numpy(ids[offsets[index] : offsets[index + 1]])
        with torch.no_grad():
            logprobs = model(input_ids=piece[None]).logits[0, :-2].log_softmax(-1)
        cost = -float(logprobs.gather(1, piece[1:-1, None]).sum()) / math.log(2)  # what ends a document is no text
        bits[document["language"]] = bits.get(document["language"], 0) + cost
        sizes[document["language"]] = sizes.get(document["language"], 0) + document["bytes"]
    assert told["bits_per_byte"] == pytest.approx(sum(bits.values()) / sum(sizes.values()), rel=1e-5)
    assert metrics["heldout_bits_per_byte"] == told["bits_per_byte"]
    by_language = {tag: found["bits_per_byte"] for tag, found in told["by_language"].items()}
    assert by_language == pytest.approx({tag: bits[tag] / sizes[tag] for tag in bits}, rel=1e-5)


def test_however_a_global_batch_is_split_it_gives_one_gradient(trained):
    whole, _ = trained("whole", per_device_train_batch_size=8, max_steps=1)
    parts, _ = trained("parts", per_device_train_batch_size=1, max_steps=1)
    assert rows(whole, "samples") == rows(parts, "samples")
    for name in ("loss", "grad_norm"):
        assert rows(parts, name)[1] == pytest.approx(rows(whole, name)[1], rel=1e-5)


def test_the_gradient_is_that_of_the_mean_over_all_tokens_of_the_batch(trained, monkeypatch):
    """The norm of the first step's gradient against one taken in float64 over all documents of the batch."""
    from pretrain.training import loop
    from pretrain.training.model import build

    fed = []
    first = loop._accumulate
    monkeypatch.setattr(loop, "_accumulate", lambda *given: fed.append(given[:2]) or first(*given))
    out, _ = trained("a", max_steps=1)
    training, samples = fed[-1]
    tokens = out.parents[1] / "tokens"
    model = build(ROOT / "configs/models/apertus-micro.yaml", tokens, 64, 17).double()
    nats, count = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        split = training.mixture.splits[sample.source]
        for piece in sample.row:
            ids = torch.from_numpy(split.ids[split.starts[piece] :][: split.lengths[piece]].astype(np.int64))
            nats = nats + torch.nn.functional.cross_entropy(
                model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum"
            )
            count += len(ids) - 1
    (nats / count).backward()
    norm = torch.stack([weights.grad.norm() for weights in model.parameters()]).norm()
    assert rows(out, "loss")[1] == pytest.approx(float(nats / count), rel=1e-6)
    assert rows(out, "grad_norm")[1] == pytest.approx(float(norm), rel=1e-5)


def test_two_sources_take_part_by_weight_and_the_share_is_told(trained, make_tokens, tmp_path):
    other = make_tokens("other", [30] * 40, seed=9)
    data = [{"tokens": str(tmp_path / "tokens"), "weight": 3}, {"tokens": str(other), "weight": 1}]
    out, metrics = trained("a", data=data, max_steps=4)
    assert metrics["data.0.token_share"] == pytest.approx(0.75, abs=0.03)
    assert metrics["data.1.epochs"] == pytest.approx(8 / 20)  # 8 of 32 rows, and two documents fill one of 20
    assert json.loads((out / "heldout.json").read_text())["documents"] == 8


def test_only_the_checkpoints_that_are_to_be_kept_are_left(trained):
    out, _ = trained("a", save_steps=2, max_steps=9, keep_checkpoints={"last": 1, "every": 4})
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"4", "8"}


def test_a_training_can_go_on_from_a_model_folder(trained):
    first, _ = trained("first", max_steps=2)
    second, _ = trained("second", model=str(first), max_steps=1, learning_rate=1e-9)
    assert rows(second, "heldout_bits_per_byte")[1] == pytest.approx(rows(first, "heldout_bits_per_byte")[2], rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_training_before_the_weights_are_touched(trained, monkeypatch):
    from pretrain.training import loop

    accumulate, calls = loop._accumulate, []

    def broken(training, *given):
        calls.append(1)
        sums = accumulate(training, *given)
        if len(calls) == 4:  # the dry run, two steps, and this one
            next(training.model.parameters()).grad.fill_(math.nan)
        return sums

    monkeypatch.setattr(loop, "_accumulate", broken)
    with pytest.raises(Fault, match=r"step 3: the loss is .* and the gradient's norm nan"):
        trained("a")


def test_rows_that_a_process_was_not_given_are_noticed(trained, monkeypatch):
    from pretrain.training import loop

    batches = loop._batches
    monkeypatch.setattr(loop, "_batches", lambda training, samples: batches(training, samples)[1:])
    with pytest.raises(Fault, match=r"the processes were given \d+ labels of a batch that holds \d+"):
        trained("a")


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"global_batch_size": 7}, UserError, "global_batch_size: 7 rows can't be divided by 2 rows"),
        ({"sequence_length": 32}, UserError, r"data\.0\.tokens: \d+ of 150 train documents exceed"),
        ({"loss": "goldfsh"}, UserError, "loss: no loss 'goldfsh'; did you mean 'goldfish'"),
        ({"optimizer": "muon"}, UserError, "optimizer: no optimizer 'muon'; known: adamw, ademamix"),
        ({"schedule": "_groups"}, UserError, "schedule: no schedule '_groups'; known: cosine, wsd"),
        ({"goldfish_k": 4}, UserError, "goldfish_k: cross_entropy does not read it; say loss: goldfish"),
        ({"ademamix_beta3": 0.99}, UserError, "ademamix_beta3: adamw does not read it; say optimizer: ademamix"),
        ({"schedule": "cosine"}, UserError, "decay_steps: cosine falls from the end of the warmup; say 0"),
        ({"report_to": ["wandb"]}, UserError, "report_to: tracker 'wandb' is not installed"),
        ({"launch": {"num_processes": 2}}, Fault, "launch.num_processes: 2 processes were asked for, and 1 run"),
    ],
)
def test_what_can_not_be_done_as_asked_stops_before_the_first_step(trained, tmp_path, keys, error, message):
    with pytest.raises(error, match=message):
        trained("a", **keys)
    assert not (tmp_path / "a" / "out" / "metrics.jsonl").exists()


def test_sources_of_different_tokenizers_are_refused(trained, make_tokens, tmp_path):
    other = make_tokens("other", [30] * 40)
    file = other / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("w100", "W100"))
    with pytest.raises(UserError, match=r"data\.1\.tokens: made with another tokenizer"):
        trained("a", data=[{"tokens": str(tmp_path / "tokens")}, {"tokens": str(other)}])


def test_trackers_are_told_what_metrics_say(trained):
    out, _ = trained("a", report_to=["tensorboard"], max_steps=2)
    assert list((out / "logs").rglob("events.out.tfevents*"))


def test_a_compiled_training_in_bfloat16_stays_near_the_eager_one_in_float32(trained):
    compiled, metrics = trained("compiled", compile="on", precision="bfloat16", max_steps=4)
    assert (metrics["compiled"], metrics["precision"]) == (True, "bfloat16")
    eager, _ = trained("eager", max_steps=4)
    assert list(rows(compiled, "loss").values()) == pytest.approx(list(rows(eager, "loss").values()), rel=5e-3)
    assert rows(compiled, "heldout_bits_per_byte")[4] == pytest.approx(
        rows(eager, "heldout_bits_per_byte")[4], rel=5e-3
    )


def test_a_compiled_training_ends_in_the_same_bits_each_time(trained):
    """Without deterministic algorithms, threads add up an embedding's gradient in whatever order they come."""
    keys = {"compile": "on", "max_steps": 3, "per_device_train_batch_size": 16, "global_batch_size": 64}
    (one, _), (other, _) = trained("one", **keys), trained("other", **keys)
    assert rows(one, "grad_norm") == rows(other, "grad_norm")
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_key_deterministic_reaches_torch(trained, deterministic):
    torch.use_deterministic_algorithms(not deterministic)
    trained("a", deterministic=deterministic, max_steps=1, warmup_steps=0, decay_steps=0)
    assert torch.are_deterministic_algorithms_enabled() == deterministic


OTHERS = {"loss": "goldfish", "goldfish_k": 3, "goldfish_h": 2, "optimizer": "ademamix", "schedule": "cosine"}
"""The second one of each kind."""


@pytest.mark.parametrize("keys", [{}, {**OTHERS, "decay_steps": 0}], ids=["default", "others"])
def test_two_processes_train_the_model_that_one_trains(trained, job, keys):
    one, _ = trained("one", max_steps=3, save_steps=[1], **keys)
    settings = ROOT / "configs/accelerate/cpu-2.yaml"
    folder = job("two", max_steps=3, launch={"num_processes": 2, "config_file": str(settings)}, **keys)
    ended = launch(folder, settings, 2)
    assert ended.returncode == 0, ended.stderr
    two = folder / "out"
    assert rows(two, "samples") == rows(one, "samples")
    assert list(rows(two, "loss").values()) == pytest.approx(list(rows(one, "loss").values()), rel=1e-5)
    assert list(rows(two, "grad_norm").values()) == pytest.approx(list(rows(one, "grad_norm").values()), rel=1e-4)
    assert rows(two, "heldout_bits_per_byte")[3] == pytest.approx(rows(one, "heldout_bits_per_byte")[3], rel=1e-4)
    begun, first, second = (load_file(path / "model.safetensors") for path in (one / "checkpoints/1", one, two))
    moved = sum(float((first[name] - begun[name]).norm() ** 2) for name in first) ** 0.5
    apart = sum(float((first[name] - second[name]).norm() ** 2) for name in first) ** 0.5
    assert apart < 0.01 * moved


def test_an_accelerate_configuration_that_starts_one_process_for_two_is_noticed(job, tmp_path):
    settings = yaml.safe_load((ROOT / "configs/accelerate/cpu-2.yaml").read_text()) | {"distributed_type": "MULTI_CPU"}
    (tmp_path / "multi_cpu.yaml").write_text(yaml.safe_dump(settings))
    folder = job("two", launch={"num_processes": 2, "config_file": str(tmp_path / "multi_cpu.yaml")})
    ended = launch(folder, tmp_path / "multi_cpu.yaml", 2)
    assert ended.returncode == 1
    assert "2 processes were asked for, and 1 run" in ended.stderr


def test_a_stop_is_saved_and_the_next_run_goes_on(trained, tmp_path):
    whole, _ = trained("whole")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "stop").touch()
    with pytest.raises(Stopped, match="step 1 of 6"):
        trained("a")
    (tmp_path / "a" / "stop").unlink()
    out, _ = trained("a")
    assert rows(out, "loss") == rows(whole, "loss")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_stop_before_anything_was_logged_is_saved_and_the_run_goes_on(trained, tmp_path):
    whole, metrics = trained("whole", logging_steps=10)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "stop").touch()
    with pytest.raises(Stopped, match="step 1 of 6"):
        trained("a", logging_steps=10)
    (tmp_path / "a" / "stop").unlink()
    out, again = trained("a", logging_steps=10)
    assert (again["loss"], rows(out, "loss")) == (metrics["loss"], rows(whole, "loss"))


def test_the_cost_is_known_before_anything_is_there(tmp_path):
    keys = {"max_steps": 10, "global_batch_size": 32, "sequence_length": 256, "learning_rate": 1e-3}
    config = train.Config(
        model=str(ROOT / "configs/models/apertus-tiny.yaml"), data=[{"tokens": str(tmp_path / "none")}], **keys
    )
    cost = train.cost(config, {"data.0.tokens": Cost(vocab_size=8192)})
    assert cost.tokens == 10 * 32 * 256
    assert cost.parameters == 5_376_776 + 8192 * 256
    assert cost.flops == cost.tokens * (6 * cost.parameters + 12 * 4 * 256 * 256)
    assert train.cost(config, {}).parameters is None


def test_a_finished_training_is_not_trained_again(trained):
    out, metrics = trained("a", max_steps=2)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    (out / "resume").mkdir()
    assert trained("a", max_steps=2)[1] == metrics
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    assert not (out / "resume").exists()
