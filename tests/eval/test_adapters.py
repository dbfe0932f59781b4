"""Adapters that are measured without being merged: by PEFT, and by the one real vLLM of the tests here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from figures import asked, figure

from cordee.errors import Fault, UserError
from cordee.stage import Context
from eval import generate

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 256
WITH_VLLM = pytest.mark.skipif(
    "not __import__('importlib.util').util.find_spec('vllm')", reason="vLLM is not installed on this platform"
)


@WITH_VLLM
def test_base_and_adapters_are_served_by_one_engine(models, checkpoints, adapters):
    from cordee.compute.adapter import open_served
    from cordee.compute.logprobs import score
    from cordee.compute.probe import as_served
    from cordee.compute.tokenizer import open_tokenizer

    texts = ["Tous les hommes naissent libres et égaux.", "Alle Menschen sind frei.", "Recht"]  # asked all at once
    ids = open_tokenizer(checkpoints["first"])(texts)["input_ids"]
    served, running = {}, None
    for name in ("first", "small", "large", "second", "small", "first", "idle"):
        folder = {**checkpoints, **adapters}[name]
        models.open(folder)
        running = running or models.engines.running
        assert models.engines.running is running
        own = models.score(ids)
        if name in served:
            assert own[0].logprobs.equal(served[name])
        served[name] = own[0].logprobs
        expected = score(as_served(open_served(folder)).eval(), ids)
        for one, other in zip(own, expected, strict=True):
            assert (one.logprobs - other.logprobs).abs().max() < 1e-4
    assert served["idle"].equal(served["first"])
    assert (served["small"] - served["first"]).abs().max() > 0.1
    assert (served["large"] - served["small"]).abs().max() > 0.1


def dropped(engine, _folder):
    """Forgets the adapter."""


def another(engine, _folder):
    """Takes the other adapter for it."""
    from vllm.lora.request import LoRARequest

    other = next(one for one in engine.group if one.name == "large")
    return LoRARequest(str(other), 1 + engine.group.index(other), str(other))


@WITH_VLLM
@pytest.mark.parametrize("fault", [dropped, another])
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, r"differ by up to .* nats from transformers'.*it holds other weights"),
        ({"PROBE_LIMIT": {"float32": 10.0}}, r"nearer to those of .*(first|large): it holds other weights"),
    ],
)
def test_an_adapter_that_is_not_used_is_a_fault(fault, limits, message, models, adapters, monkeypatch):
    from cordee.compute import engine, probe

    for name, value in limits.items():
        monkeypatch.setattr(probe, name, value)
    monkeypatch.setattr(engine.Engine, "_adapter", fault)
    with pytest.raises(Fault, match=message):
        models.open(adapters["small"])
    monkeypatch.undo()
    models.open(adapters["small"])


@WITH_VLLM
def test_an_adapter_that_is_not_used_is_a_fault_where_rounding_would_hide_it(models, adapters, monkeypatch):
    from cordee.compute import engine, probe

    monkeypatch.setattr(probe, "NEARER", float("inf"))
    monkeypatch.setattr(probe, "PROBE_LIMIT", {"float32": 1e-3, "bfloat16": 10.0})
    monkeypatch.setattr(engine.Engine, "dtype", "bfloat16")
    models.open(adapters["small"])
    monkeypatch.setattr(engine.Engine, "_adapter", dropped)
    with pytest.raises(Fault, match=r"log-probabilities are those of .*first, from which .* nats away: it is not used"):
        models.open(adapters["small"])


@WITH_VLLM
def test_an_adapter_of_which_a_part_is_not_used_is_a_fault(models, adapters, monkeypatch, tmp_path):
    """As where a module has another name in vLLM, which only warns of it."""
    from safetensors.torch import load_file, save_file
    from vllm.lora.request import LoRARequest

    from cordee.compute import engine, probe

    folder = shutil.copytree(adapters["small"], tmp_path / "partly")
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("model.layers.1.", "model.blocks.1."): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    monkeypatch.setattr(probe, "NEARER", float("inf"))
    monkeypatch.setattr(probe, "PROBE_LIMIT", {"float32": 10.0})
    monkeypatch.setattr(engine.Engine, "_adapter", lambda *_: LoRARequest("partly", 99, str(folder)))
    with pytest.raises(Fault, match="vLLM uses 6 of the adapter's 12 matrices"):
        models.open(adapters["small"])


@WITH_VLLM
def test_it_answers_what_peft_answers(models, checkpoints, adapters):
    from cordee.compute.adapter import open_served
    from cordee.compute.generating import generate as by_transformers
    from cordee.compute.tokenizer import open_tokenizer
    from eval.measuring.sampling import Sampling

    folder, greedy = adapters["large"], Sampling()
    ids = open_tokenizer(checkpoints["first"])(["Alle Menschen sind frei", "Tous"])["input_ids"]
    models.open(folder)
    answers = models.engines.running.generate(ids, [0, 0], 12, greedy.for_vllm())
    assert answers == by_transformers(open_served(folder), folder, ids, [0, 0], 12, greedy.for_transformers(), 2)
    models.open(checkpoints["first"])
    assert models.engines.running.generate(ids, [0, 0], 12, greedy.for_vllm()) != answers


@WITH_VLLM
def test_lm_eval_measures_an_adapter_as_transformers_does_and_as_it_is_merged(
    models, adapters, held_out, checkpoints, tmp_path
):
    from cordee.compute.adapter import open_served
    from cordee.compute.engine import Settings
    from cordee.compute.model import save_model
    from eval.measuring import backends, harness
    from eval.measuring.answers import Asked

    save_model(open_served(adapters["small"]).merge_and_unload(), tmp_path / "merged", tokenizer=checkpoints["first"])
    path = ROOT / "eval" / "tasks" / "heldout_bits_per_byte.yaml"
    tasks = asked([path], held_out, checkpoints["first"], tmp_path)
    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")
    by_transformers = backends.Models(Settings("transformers", LENGTH), [])
    bits = {}
    for name, opened, folder in (
        ("vllm", models, adapters["small"]),
        ("transformers", by_transformers, adapters["small"]),
        ("merged", by_transformers, tmp_path / "merged"),
        ("base", by_transformers, checkpoints["first"]),
    ):
        measured = harness.measure(Asked(opened, folder, tmp_path), name, tasks, context)
        bits[name] = figure(measured, "heldout_bits_per_byte")["value"]
    assert bits["vllm"] == pytest.approx(bits["merged"], rel=2e-3)  # xIELU's slopes
    assert bits["transformers"] == pytest.approx(bits["merged"], rel=1e-5)
    assert bits["base"] != pytest.approx(bits["merged"], rel=5e-3)


REFUSED = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [5, 6]},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 2}},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "init_lora_weights: pissa": {"init_lora_weights": "pissa"},
    "base_model.model.model.embed_tokens.base_layer.weight": {"target_modules": ["embed_tokens", "q_proj"]},
}


@WITH_VLLM
@pytest.mark.parametrize("what", REFUSED)
def test_what_vllm_would_leave_out_is_refused_and_measured_by_transformers(what, checkpoints, held_out, tmp_path):
    """vLLM itself refuses some, and computes the others without a word and otherwise than PEFT."""
    from chat_models import make_adapter

    from cordee.compute import engine, serving

    folder = make_adapter(tmp_path / "adapter", checkpoints["first"], seed=4, **REFUSED[what])
    with pytest.raises(UserError) as caught:
        serving.require_served({"dpo": folder}, engine.Settings("vllm"))
    assert f"models.dpo: vLLM serves no adapter with {what}; merge the adapter first" in str(caught.value)
    (tmp_path / "out").mkdir()
    config = {"models": {"dpo": str(folder)}, "prompts": str(held_out["language"]), "engine": "transformers"}
    context = Context(out=tmp_path / "out", seed=3, events=tmp_path / "events.jsonl")
    generate.run(generate.Config.model_validate({**config, "max_tokens": 2, "max_prompts": 1}), context)


@WITH_VLLM
@pytest.mark.long
def test_models_of_two_shapes_and_an_adapter_answer_by_vllm_as_by_transformers(
    checkpoints, adapters, held_out, tmp_path
):
    """By the stage's own entry point."""
    from chat_models import make_model

    wide = make_model(tmp_path / "wide", 128)
    models = {"first": checkpoints["first"], "wide": wide, "small": adapters["small"], "second": checkpoints["second"]}
    answers = {}
    for engine in ("vllm", "transformers"):
        config = {
            "models": {name: str(path) for name, path in models.items()}, "prompts": str(held_out["language"]),
            "engine": engine, "dtype": "float32", "enforce_eager": True, "max_tokens": 8,
        }  # fmt: skip
        (tmp_path / "c.yaml").write_text(json.dumps(config))
        command = ["-m", "eval.generate", "--config", str(tmp_path / "c.yaml"), "--runs", str(tmp_path / engine)]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        (file,) = (tmp_path / engine).rglob("samples.jsonl")
        answers[engine] = [json.loads(line)["outputs"] for line in file.read_text().splitlines()]
    assert list(answers["vllm"][0]) == list(models)
    assert answers["vllm"] == answers["transformers"]


def test_an_adapter_without_effect_is_noted(adapters, checkpoints, held_out, tmp_path):
    (tmp_path / "out").mkdir()
    config = {
        "models": {name: str(folder) for name, folder in {**adapters, **checkpoints}.items()},
        "prompts": str(held_out["language"]), "engine": "transformers", "max_tokens": 4, "max_prompts": 2,
    }  # fmt: skip
    context = Context(out=tmp_path / "out", seed=3, events=tmp_path / "events.jsonl")
    generate.run(generate.Config.model_validate(config), context)
    notes = [line for line in (tmp_path / "events.jsonl").read_text().splitlines() if "no effect" in line]
    assert len(notes) == 1
    assert "idle: the adapter has no effect: all its matrices B are zero" in notes[0]
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert all(row["outputs"]["idle"] == row["outputs"]["first"] for row in rows)
    assert any(row["outputs"]["small"] != row["outputs"]["first"] for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "some/model"}, "models.dpo: its base 'some/model' is no model folder here"),
        (
            {"base_model_name_or_path": None},
            "models.dpo: its config names no base; give the folder of the model that it was trained",
        ),
        ({"base_model_name_or_path": "."}, "models.dpo: its base '.' is no model folder here"),
    ],
)
def test_a_base_that_is_not_there_is_one_line(change, message, adapters, tmp_path):
    from cordee.compute import engine, serving

    folder = shutil.copytree(adapters["large"], tmp_path / "adapter")
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | change))
    with pytest.raises(UserError) as caught:
        serving.require_served({"dpo": folder}, engine.Settings("transformers"))
    assert message in str(caught.value)


def test_another_base_than_the_one_it_was_trained_on_is_one_line(adapters, checkpoints, tmp_path):
    from cordee import files, model_folder

    folder = shutil.copytree(adapters["large"], tmp_path / "adapter")
    weights = checkpoints["first"] / "model.safetensors"
    record = folder / model_folder.ADAPTERS_BASE
    record.write_text(json.dumps({"files": {weights.name: files.sha256(weights)}}))
    model_folder.require_served(folder)
    record.write_text(json.dumps({"files": {weights.name: files.sha256(checkpoints["second"] / weights.name)}}))
    with pytest.raises(UserError, match=r"was trained on other weights than those of .*first"):
        model_folder.require_served(folder)


def test_a_changed_base_makes_the_stage_stale(adapters, checkpoints, held_out, tmp_path, cordee, write):
    """Only the adapter is named in the recipe."""
    base = shutil.copytree(checkpoints["first"], tmp_path / "base")
    folder = shutil.copytree(adapters["large"], tmp_path / "adapter")
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": "../base"}))
    write(
        "r.yaml",
        f"name: r\nseed: 1\nstages:\n  samples: {{uses: eval.generate, models: {{dpo: adapter}}, "
        f"prompts: {held_out['language']}, engine: transformers, max_tokens: 2, max_prompts: 1}}\n",
    )
    done = cordee("run", "r.yaml")
    assert done.returncode == 0, done.stderr
    assert "done" in cordee("plan", "r.yaml").stdout
    shutil.copy(checkpoints["second"] / "model.safetensors", base / "model.safetensors")
    told = cordee("plan", "r.yaml").stdout
    assert "models.dpo content" in told
    assert "stale" in told
    shutil.rmtree(base)
    missing = cordee("plan", "r.yaml")
    assert missing.returncode == 2
    assert "its base '../base' is no model folder here" in missing.stderr
    assert "Traceback" not in missing.stderr
