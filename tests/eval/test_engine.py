"""One real vLLM engine for all tests here: what it says is what transformers says, of the right checkpoint."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from figures import asked, figure

from cordee.errors import Fault, Stopped, UserError
from cordee.stage import Context

pytest.importorskip("vllm", reason="vLLM is not installed on this platform")
ROOT = Path(__file__).resolve().parents[2]
TASKS = [
    str(ROOT / path)
    for path in ("eval/tasks/heldout_bits_per_byte.yaml", *sorted(ROOT.glob("examples/udhr/tasks/*.yaml")))
]
LENGTH = 256
EAGER = {"max_length": LENGTH, "dtype": "float32", "enforce_eager": True}


@pytest.fixture
def tasks(checkpoints, held_out, tmp_path):
    return asked(TASKS, held_out, checkpoints["first"], tmp_path)


@pytest.fixture
def engine(models, checkpoints):
    models.open(checkpoints["first"])
    return models.engines.running


def test_after_a_reload_it_gives_the_new_checkpoints_logprobs(engine, checkpoints):
    from cordee.compute.tokenizer import open_tokenizer

    ids = open_tokenizer(checkpoints["first"])("Alle Menschen")["input_ids"]
    engine.load(checkpoints["first"])
    first = engine.score([ids])[0].logprobs
    assert engine.load(checkpoints["second"]) < 1e-4
    second = engine.score([ids])[0].logprobs
    assert (first - second).abs().max() > 0.1
    engine.load(checkpoints["first"])
    assert (engine.score([ids])[0].logprobs - first).abs().max() < 1e-6


def test_all_that_differs_from_transformers_is_xielus_slopes(engine, checkpoints):
    import torch

    from cordee.compute.logprobs import score
    from cordee.compute.model import open_model
    from cordee.compute.probe import as_served
    from cordee.compute.tokenizer import open_tokenizer

    engine.load(checkpoints["second"])
    ids = [open_tokenizer(checkpoints["second"])("Tous les hommes naissent libres et égaux. " * 4)["input_ids"]]
    model = open_model(checkpoints["second"], dtype=torch.float32).eval()
    served = engine.score(ids)[0].logprobs
    plain = float((score(model, ids)[0].logprobs - served).abs().max())
    rounded = float((score(as_served(model), ids)[0].logprobs - served).abs().max())
    assert rounded < 5e-5
    assert plain > 4 * rounded


def test_weights_that_were_not_replaced_are_a_fault(engine, checkpoints, monkeypatch):
    engine.load(checkpoints["first"])
    with monkeypatch.context() as planted:
        planted.setattr(engine.llm, "collective_rpc", lambda *_arguments, **_options: None)
        with pytest.raises(Fault, match="vLLM holds another "):
            engine.load(checkpoints["second"])
    engine.load(checkpoints["first"])


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (1.5, r"differ by up to .* it holds other weights"),
        (1.0004, r"nearer to those of .*first: it holds other weights"),
    ],
)
def test_one_matrix_that_was_not_replaced_is_a_fault(factor, message, engine, checkpoints, monkeypatch, tmp_path):
    """vLLM packs it away on a CPU, so that only what the model says can show it; a little, it is within the limit."""
    from safetensors.torch import load_file, save_file

    from cordee.compute.engine import probes

    changed = shutil.copytree(checkpoints["first"], tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= factor
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(engine, "probes", {**engine.probes, **probes([changed])})
    engine.load(checkpoints["first"])
    with monkeypatch.context() as planted:
        planted.setattr(engine.llm, "collective_rpc", lambda *_arguments, **_options: None)
        with pytest.raises(Fault, match=rf"{message}|vLLM holds another"):
            engine.load(changed)
    engine.load(changed)
    engine.load(checkpoints["first"])


def test_a_copy_of_a_model_is_as_near_and_no_fault(engine, checkpoints, monkeypatch, tmp_path):
    from cordee.compute.engine import probes

    copy = shutil.copytree(checkpoints["first"], tmp_path / "copy")
    monkeypatch.setattr(engine, "probes", {**engine.probes, **probes([copy])})
    engine.load(copy)
    engine.load(checkpoints["first"])


def test_a_prefix_cache_of_other_weights_is_a_fault(engine, checkpoints, monkeypatch):
    engine.load(checkpoints["first"])
    with monkeypatch.context() as planted:
        planted.setattr(engine.llm, "reset_prefix_cache", lambda: False)
        with pytest.raises(Fault, match="kept its prefix cache"):
            engine.load(checkpoints["second"])
    engine.load(checkpoints["second"])


def test_it_generates_what_transformers_generates(engine, checkpoints):
    """Greedy, and where penalties, end texts and the least number of tokens move or end an answer."""
    from cordee.compute.generating import generate
    from cordee.compute.model import open_model
    from cordee.compute.tokenizer import open_tokenizer
    from eval.measuring.sampling import Sampling

    folder = checkpoints["second"]
    engine.load(folder)
    model, ids = open_model(folder), open_tokenizer(folder)(["Alle Menschen sind frei", "Tous"])["input_ids"]
    said = []
    for keys in ({}, {"repetition_penalty": 1.3}, {"temperature": 1.0, "top_k": 1}, {"min_tokens": 12}, {"stop": "e"}):
        chosen = Sampling(**keys)
        answers = engine.generate(ids, [1, 2], 12, chosen.for_vllm())
        assert answers == generate(model, folder, ids, [1, 2], 12, chosen.for_transformers(), 2)
        said.append(answers)
    assert [one.finish_reason for one in said[0]] == ["length", "length"]
    assert said[1] != said[0] == said[2]
    text = next(one.text for one in said[0] if len(one.text) > 3)[1:3]
    cut = engine.generate(ids, [1, 2], 12, Sampling(stop=[text]).for_vllm())
    assert "stop" in [one.finish_reason for one in cut]
    assert all(text not in one.text for one in cut)
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert engine.generate(ids, [1, 2], 12, Sampling(**{penalty: 2.0}).for_vllm()) != said[0]


def test_the_sampling_keys_are_vllms_with_its_defaults_but_for_the_temperature():
    from vllm import SamplingParams

    from eval.measuring.sampling import Sampling

    ours, own = Sampling(), SamplingParams()
    assert {*Sampling.model_fields} <= {*SamplingParams.__struct_fields__}
    assert {*ours.for_vllm()} == {*Sampling.model_fields} - {"seed"}
    for name in {*Sampling.model_fields} - {"temperature"}:
        assert getattr(ours, name) == getattr(own, name), name


@pytest.fixture
def answered(models, checkpoints, held_out, monkeypatch, tmp_path):
    """Runs the stage `eval.generate` in the engine of these tests, in a folder, up to a stop after some parts."""
    from cordee.compute import serving
    from eval import generate

    models.open(checkpoints["first"])
    monkeypatch.setattr(serving, "Engines", lambda *_: models.engines)
    monkeypatch.setattr(models.engines, "stop", lambda: None)

    def run(name, parts=None, **keys):
        given = {"models": {n: str(path) for n, path in checkpoints.items()}, "prompts": str(held_out["language"])}
        sampled = {"n": 3, "sampling": {"temperature": 1.0, "top_p": 0.9}, "max_tokens": 16, "batch_size": 3}
        config = generate.Config.model_validate({**given, **EAGER, "engine": "vllm", **sampled, **keys})
        (tmp_path / name).mkdir(exist_ok=True)
        context = Context(out=tmp_path / name, seed=3, events=tmp_path / name / "events.jsonl")
        with monkeypatch.context() as patch:
            if parts is not None:
                patch.setattr(Context, "stop_requested", lambda self: len(list(self.out.rglob("parts/*/0*"))) >= parts)
                with pytest.raises(Stopped, match=r"stopped at answer \d+ of 24"):
                    generate.run(config, context)
            else:
                generate.run(config, context)
        return {path.name: path.read_text() for path in context.out.glob("answers/*.jsonl")}

    return run


def test_an_interrupted_generation_ends_in_the_same_answers(answered):
    whole = answered("whole")
    rows = [json.loads(line) for line in whole["first.jsonl"].splitlines()]
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [(n, k) for n in range(4) for k in range(3)]
    assert len({row["messages"][-1]["content"] for row in rows}) == 12
    answered("again", parts=2)
    assert answered("again") == whole
    assert answered("other parts", batch_size=6) == whole


def test_lm_eval_measures_with_vllm_what_it_measures_with_transformers(models, checkpoints, tasks, tmp_path):
    from cordee.compute.engine import Settings
    from eval.measuring import backends, harness
    from eval.measuring.answers import Asked

    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")
    by_engine = {}
    for name, opened in (("vllm", models), ("transformers", backends.Models(Settings("transformers", LENGTH), []))):
        by_engine[name] = harness.measure(Asked(opened, checkpoints["second"], tmp_path), name, tasks, context)
        assert len(list((tmp_path / "lm_eval" / name).glob("*/results_*.json"))) == 2
    one, other = by_engine["vllm"], by_engine["transformers"]
    for task in ("language_choice", "language_answer"):
        assert figure(one, task)["value"] == figure(other, task)["value"]
    for name in ("value", "standard_error"):
        values = [figure(measured, "heldout_bits_per_byte")[name] for measured in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=2e-3)


def test_bits_per_byte_are_those_of_the_closed_form(models, checkpoints, held_out, tasks, tmp_path):
    import math

    import torch

    from cordee.compute.logprobs import score
    from cordee.compute.model import open_model
    from cordee.compute.tokenizer import open_tokenizer
    from eval.measuring import harness
    from eval.measuring.answers import Asked

    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")
    plain = [batch for batch in tasks if not batch.is_chat]
    measured = figure(
        harness.measure(Asked(models, checkpoints["first"], tmp_path), "m", plain, context), "heldout_bits_per_byte"
    )
    texts = pq.read_table(held_out["documents"])["text"].to_pylist()
    tokenizer, model = open_tokenizer(checkpoints["first"]), open_model(checkpoints["first"], dtype=torch.float64)
    nats = sum(
        float(scores.logprobs.double().sum())
        for scores in score(model, [tokenizer(text)["input_ids"] for text in texts])
    )
    expected = -nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert measured["value"] == pytest.approx(expected, rel=2e-3)
    assert set(measured["by_language"]) == {"de", "fr"}


def with_prompt(text, held_out, folder):
    """The held-out file with another prompt in its second row."""
    rows = [json.loads(line) for line in held_out["language"].read_text().splitlines()]
    rows[1]["prompt"] = text
    path = folder / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**held_out, "language": path}


@pytest.mark.parametrize("name", ["language_choice", "language_answer"])
def test_a_request_that_lm_eval_would_cut_is_an_error(name, models, checkpoints, held_out, tmp_path):
    from eval.measuring import harness
    from eval.measuring.answers import Asked

    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")
    path = next(path for path in TASKS if name in path)
    data = with_prompt("Menschen " * LENGTH, held_out, tmp_path)
    tasks = asked([path], data, checkpoints["first"], tmp_path)
    with pytest.raises(
        UserError, match=rf"max_length: \d of \d+ requests don't fit: document 1 of {name} has \d+ tokens.*; \d+ fit"
    ):
        harness.measure(Asked(models, checkpoints["first"], tmp_path), "m", tasks, context)


@pytest.mark.parametrize("path", TASKS)
def test_documents_that_spell_out_a_special_token_are_counted(path, models, checkpoints, held_out, tmp_path):
    from eval.measuring import harness
    from eval.measuring.answers import Asked

    pq.write_table(pa.table({"text": ["frei", "</s> frei"], "language": ["de", "de"]}), tmp_path / "documents.parquet")
    data = {**with_prompt("frei</s>", held_out, tmp_path), "documents": tmp_path / "documents.parquet"}
    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")
    tasks = asked([path], data, checkpoints["first"], tmp_path)
    row = harness.measure(Asked(models, checkpoints["first"], tmp_path), "m", tasks, context)
    ((note, *_),) = row["notes"].values()
    assert re.search(r"1 of \d documents spell out a special token such as '</s>', which lm-eval encodes", note)


def test_rolling_windows_that_begin_twice_are_said(models, checkpoints, held_out, rolling, tmp_path):
    from eval.measuring import harness
    from eval.measuring.answers import Asked

    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")
    tasks = asked([rolling], held_out, checkpoints["first"], tmp_path)
    (note,) = harness.measure(Asked(models, checkpoints["first"], tmp_path), "m", tasks, context)["notes"]["rolling"]
    assert note.startswith("lm-eval's windows begin with '<s>' twice")


def test_long_documents_are_read_in_windows_and_every_token_counts(models, checkpoints, held_out, tmp_path):
    from eval.measuring import harness
    from eval.measuring.answers import Asked

    text = "Alle Menschen sind frei. " * 40
    pq.write_table(pa.Table.from_pylist([{"text": text, "language": "de"}]), tmp_path / "long.parquet")
    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")
    path = next(path for path in TASKS if "bits_per_byte" in path)
    data = {**held_out, "documents": tmp_path / "long.parquet"}
    tasks = asked([path], data, checkpoints["first"], tmp_path)
    row = figure(
        harness.measure(Asked(models, checkpoints["first"], tmp_path), "m", tasks, context), "heldout_bits_per_byte"
    )
    assert 1 < row["value"] < 20
    assert row["standard_error"] is None  # one document has none


def test_a_stop_is_heard_between_requests(models, checkpoints, tasks, monkeypatch, tmp_path):
    from eval.measuring import harness
    from eval.measuring.answers import Asked

    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")

    def stop(requests):
        raise Stopped(f"before {requests} requests")

    monkeypatch.setattr(models, "watch", stop)
    with pytest.raises(Stopped, match=r"before \d+ requests"):
        harness.measure(Asked(models, checkpoints["first"], tmp_path), "m", tasks, context)


def test_results_that_lm_eval_could_not_write_are_a_fault(models, checkpoints, tasks, tmp_path):
    from eval.measuring import harness
    from eval.measuring.answers import Asked

    (tmp_path / "lm_eval").write_text("a file where a folder should be")
    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")
    with pytest.raises(Fault, match="lm-eval did not write samples_"):
        harness.measure(Asked(models, checkpoints["first"], tmp_path), "m", tasks[:1], context)


def test_a_template_that_lm_eval_would_send_otherwise_is_a_fault(models, checkpoints, monkeypatch):
    lm = models.open(checkpoints["first"])
    monkeypatch.setattr(lm, "apply_chat_template", lambda turns: "<s><s>" + turns[0]["content"])
    with pytest.raises(Fault, match="lm-eval sends other ids"):
        models.open(checkpoints["first"])


def test_chats_that_are_encoded_otherwise_are_counted(models, checkpoints, monkeypatch, tmp_path):
    from cordee.compute.model import stop_token_ids
    from eval.measuring import parity

    lm = models.open(checkpoints["first"])
    chats = [
        [{"role": "user", "content": f"Which language is this?\n\n{text}"}, {"role": "assistant", "content": "German"}]
        for text in ("Jeder hat das Recht auf Leben.", "Alle Menschen")
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    chats, ids = parity.read(path, 8, checkpoints["first"], LENGTH)
    ends = stop_token_ids(checkpoints["first"])
    assert parity.encoded_differently_by_vllm(lm.model, chats, ids) == 0
    assert parity.encoded_differently_by_lm_eval(lm, chats, ids, ends) == 0
    changed = [ids[0], [ids[1][0], *ids[1]]]
    assert parity.encoded_differently_by_vllm(lm.model, chats, changed) == 1
    assert parity.encoded_differently_by_lm_eval(lm, chats, changed, ends) == 1
    monkeypatch.setattr(lm, "apply_chat_template", lambda turns: turns[0]["content"])
    assert parity.encoded_differently_by_lm_eval(lm, chats, ids, ends) == 2
