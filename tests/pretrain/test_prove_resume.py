import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from cordee import trial, worker
from cordee.compute import device
from cordee.errors import Fault, UserError
from cordee.launchers import command
from cordee.stage import Context
from pretrain import prove_resume, train
from pretrain.training import trials


@pytest.fixture
def proven(job):
    """Runs the proof on the micro model: `out, metrics = proven("a", kill_at_step=4)`."""

    def call(name, **keys):
        folder = job(name, **keys)
        told = json.loads((folder / "job.json").read_text())
        context = Context(out=folder / "out", seed=17, events=folder / "events.jsonl")
        config = prove_resume.Config.model_validate(told["config"])
        return context.out, worker.run_stage(config, context, prove_resume.run)

    return call


def test_resume_is_proven_with_real_processes_and_a_real_kill(proven, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, metrics = proven("a", steps=12, kill_at_step=4, max_steps=500, global_batch_size=64)
    certificate = json.loads((out / "certificate.json").read_text())
    assert (certificate["proof"], certificate["of"]) == ("resume", "pretrain.train")
    assert [check["passed"] for check in certificate["checks"]] == [True] * 6
    evidence = certificate["evidence"]
    assert evidence["uninterrupted"]["weights_sha256"] == evidence["killed"]["weights_sha256"]
    assert evidence["killed"]["resumed_from_step"] >= 2
    assert evidence["other"]["samples"] == evidence["uninterrupted"]["samples"]
    assert evidence["other_num_processes"] == 2
    assert metrics["passed"]
    assert [path.name for path in out.iterdir()] == ["certificate.json"]


def test_trainings_start_as_the_product_starts_them_and_the_proof_without_a_launcher(proven, monkeypatch, tmp_path):
    class StartedError(Exception):
        pass

    def start(started):
        raise StartedError(started)

    monkeypatch.setattr(trial.local, "start", start)
    with pytest.raises(Fault, match="StartedError") as caught:
        proven("a", launch={"num_processes": 2})
    started = caught.value.__cause__.args[0]
    folder = tmp_path / "a" / "out" / "work" / "uninterrupted"
    config = train.Config.model_validate(json.loads((folder / "job.json").read_text())["config"])
    assert started.argv == command.of_stage("pretrain.train", config, folder / "job.json")
    assert started.argv[started.argv.index("--num_processes") + 1] == "2"
    told = json.loads((tmp_path / "a" / "job.json").read_text())["config"]
    proof = command.of_stage("pretrain.prove_resume", prove_resume.Config.model_validate(told), tmp_path / "job.json")
    assert proof == (sys.executable, "-m", "pretrain.prove_resume", "--job", str(tmp_path / "job.json"))


@pytest.mark.parametrize("kind", ["a YAML", "a folder"])
def test_the_proof_compiles_where_the_training_does(proven, trained, write, monkeypatch, kind):
    """Of a Llama the plan's estimate knows no FLOPs, nor of a shape of which the YAML leaves out a field."""
    model = str(write("m.yaml", "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, "
                      "num_hidden_layers: 2, max_position_embeddings: 128}"))  # fmt: skip
    if kind == "a folder":
        model = str(trained("before", model=model)[0])
    asked, resolve = [], device.resolve_compile

    def resolved(key, flops, where):
        asked.append((key, flops, where))
        return resolve(key, flops, where)

    monkeypatch.setattr(device, "resolve_compile", resolved)
    _, metrics = trained("base", model=model, compile="auto")
    monkeypatch.setattr(trial, "start", lambda *_: pytest.fail("started"))
    with pytest.raises(pytest.fail.Exception):
        proven("a", model=model, compile="auto")
    assert asked == [("auto", pytest.approx(metrics["flops"], rel=0.5), torch.device("cpu"))] * 2
    assert asked[0] == asked[1]


def test_a_proof_that_a_launcher_started_is_refused(proven, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"start it with python -m pretrain\.prove_resume"):
        proven("a")


def test_a_kill_after_the_end_is_refused(proven):
    with pytest.raises(UserError, match="kill_at_step: is not before the last of 6 steps"):
        proven("a", steps=6, kill_at_step=6)


def test_a_training_that_fails_fails_the_proof_with_its_own_words(proven, write):
    with pytest.raises(UserError, match=r"m.yaml: hiden_size: apertus has no field 'hiden_size'"):
        proven("a", model=str(write("m.yaml", "hiden_size: 3")))
    model = write("m.yaml", "{hidden_size: 32, num_hidden_layers: 1, max_position_embeddings: 8}")
    with pytest.raises(Fault, match=r"the run for the proof failed: .*8 positions do not hold a sequence_length of 64"):
        proven("b", model=str(model))


@pytest.fixture
def ended(trained):
    """Two equal trainings of which the second looks continued."""
    one, other = (trained(name, save_steps=[1])[0] for name in ("one", "other"))
    return trials.Ended(one), trials.Ended(other, resumed_from=2)


def failed(checks):
    return [check.name for check in checks if not check.passed]


def test_equal_trainings_pass(ended):
    assert failed(trials.same_bits(*ended) + trials.same_within_rounding(*ended)) == []


def test_one_bit_in_the_weights_is_seen(ended):
    file = ended[1].out / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][0, 0] *= 1 + 2**-23
    save_file(weights, file)
    assert failed(trials.same_bits(*ended)) == ["weight tensors that differ in any bit"]


def test_another_sample_is_seen(ended):
    file = ended[1].out / "metrics.jsonl"
    file.write_text(file.read_text().replace(ended[1].rows()[3]["samples"], "abc"))
    assert failed(trials.same_bits(*ended)) == ["steps whose samples differ"]
    assert failed(trials.same_within_rounding(*ended)) == ["steps whose samples differ at another number of processes"]


def test_a_training_that_began_anew_proves_nothing(ended):
    assert failed(trials.same_bits(ended[0], ended[0])) == ["resumed from the point at step"]


def test_weights_that_went_elsewhere_are_seen(ended, trained):
    elsewhere, _ = trained("elsewhere", learning_rate=2.9e-3)
    assert len(failed(trials.same_within_rounding(ended[0], trials.Ended(elsewhere)))) == 1
