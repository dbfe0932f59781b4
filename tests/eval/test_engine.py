"""One real vLLM engine for all tests here: what it says is what transformers says, of the right checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from cordee.errors import Fault, UserError
from cordee.stage import Context

pytest.importorskip("vllm", reason="vLLM is not installed on this platform")
TASKS = [str(path) for path in sorted((Path(__file__).resolve().parents[2] / "eval" / "tasks").glob("*.yaml"))]
LENGTH = 256


@pytest.fixture(scope="module")
def models(checkpoints):
    """lm-eval around the one engine, opened on the first checkpoint."""
    from eval import harness

    opened = harness.Models("vllm", LENGTH, 4, seed=0)
    opened.open(checkpoints["first"])
    return opened


@pytest.fixture(scope="module")
def engine(models):
    return models.served[1]


def test_after_a_reload_it_gives_the_new_checkpoints_logprobs(engine, checkpoints):
    from cordee.compute.model import open_tokenizer

    ids = open_tokenizer(checkpoints["first"])("Alle Menschen")["input_ids"]
    engine.load(checkpoints["first"])
    first = engine.score([ids])[0].logprobs
    assert engine.load(checkpoints["second"]) < 0.01
    second = engine.score([ids])[0].logprobs
    assert (first - second).abs().max() > 0.1
    engine.load(checkpoints["first"])
    assert (engine.score([ids])[0].logprobs - first).abs().max() < 1e-6


def test_weights_that_were_not_replaced_are_a_fault(engine, checkpoints, monkeypatch):
    engine.load(checkpoints["first"])
    monkeypatch.setattr(engine.llm, "collective_rpc", lambda *_arguments, **_options: None)
    with pytest.raises(Fault, match="it holds other weights"):
        engine.load(checkpoints["second"])
    monkeypatch.undo()
    engine.folder = Path()
    engine.load(checkpoints["first"])


def test_it_generates_what_transformers_generates(engine, checkpoints):
    from eval import prompts

    engine.load(checkpoints["second"])
    ids = prompts.encode(checkpoints["second"], ["Alle Menschen sind frei", "Tous"], LENGTH, Path("p"))
    assert engine.generate(ids, 12, 0.0, 0) == prompts.generate(checkpoints["second"], ids, 12, 0.0, 0, 2)


def test_lm_eval_measures_with_vllm_what_it_measures_with_transformers(models, checkpoints, held_out, tmp_path):
    from eval import harness

    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")
    tasks = [harness.read_task(Path(path), held_out) for path in TASKS]
    by_engine = {}
    for name, opened in (("vllm", models), ("transformers", harness.Models("transformers", LENGTH, 4, seed=0))):
        by_engine[name] = harness.measure(opened.open(checkpoints["second"]), name, tasks, None, context)
        assert len(list((tmp_path / "lm_eval" / name).glob("results_*.json"))) == 2
    one, other = by_engine["vllm"]["results"], by_engine["transformers"]["results"]
    assert one["language_choice"]["acc"] == other["language_choice"]["acc"]
    assert one["language_answer"]["exact_match"] == other["language_answer"]["exact_match"]
    bits = [result["heldout_bits_per_byte"]["bits_per_byte"] for result in (one, other)]
    assert bits[0] == pytest.approx(bits[1], rel=2e-3)


def test_bits_per_byte_are_those_of_the_closed_form(models, checkpoints, held_out, tmp_path):
    import math

    import pyarrow.parquet as pq
    import torch

    from cordee.compute.logprobs import score
    from cordee.compute.model import open_model, open_tokenizer
    from eval import harness

    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")
    task = next(task for task in (harness.read_task(Path(path), held_out) for path in TASKS) if not task.is_chat)
    measured = harness.measure(models.open(checkpoints["first"]), "m", [task], None, context)
    texts = pq.read_table(held_out["documents"])["text"].to_pylist()
    tokenizer, model = open_tokenizer(checkpoints["first"]), open_model(checkpoints["first"], dtype=torch.float64)
    nats = sum(
        float(scores.logprobs.double().sum())
        for scores in score(model, [tokenizer(text)["input_ids"] for text in texts])
    )
    expected = -nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert measured["results"][task.name]["bits_per_byte"] == pytest.approx(expected, rel=2e-3)
    assert set(measured["by_language"][task.name]) == {"de", "fr"}


def test_a_request_that_lm_eval_would_cut_is_an_error(models, checkpoints, held_out, tmp_path):
    from eval import harness

    long = tmp_path / "long.jsonl"
    row = json.loads(held_out["language"].read_text().splitlines()[0])
    long.write_text(json.dumps(row | {"prompt": "Menschen " * LENGTH}) + "\n")
    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")
    for path in TASKS:
        task = harness.read_task(Path(path), {**held_out, "language": long})
        if task.is_chat:
            with pytest.raises(UserError, match=r"max_length: a request has \d+ tokens, and \d+ have room"):
                harness.measure(models.open(checkpoints["first"]), "m", [task], None, context)


def test_results_that_lm_eval_could_not_write_are_a_fault(models, checkpoints, held_out, tmp_path):
    from eval import harness

    task = harness.read_task(Path(TASKS[0]), held_out)
    (tmp_path / "lm_eval").write_text("a file where a folder should be")
    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")
    with pytest.raises(Fault, match="lm-eval did not write samples_"):
        harness.measure(models.open(checkpoints["first"]), "m", [task], None, context)


def test_a_template_that_lm_eval_would_send_otherwise_is_a_fault(models, checkpoints, monkeypatch):
    lm = models.open(checkpoints["first"])
    monkeypatch.setattr(lm, "apply_chat_template", lambda turns: "<s><s>" + turns[0]["content"])
    with pytest.raises(Fault, match="lm-eval sends other ids"):
        models.open(checkpoints["first"])


def test_two_shapes_are_refused(checkpoints, tmp_path):
    from chat_models import make_model

    from cordee.compute import engine

    with pytest.raises(UserError, match=r"models\.wide: has another hidden_size than first: 128 instead of 64"):
        engine.require_one_shape({"first": checkpoints["first"], "wide": make_model(tmp_path / "wide", 128)})
    shutil.copytree(checkpoints["second"], tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ bos_token }}")
    with pytest.raises(UserError, match=r"has another chat_template\.jinja than first"):
        engine.require_one_shape({"first": checkpoints["first"], "other": tmp_path / "other"})
