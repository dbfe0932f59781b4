"""A certificate holds for what it was made with: a proof is made anew once that is not what there is now."""

from pathlib import Path

import pytest
from rich.console import Console

from cordee import certificate, clean, machine, plan, prove, provenance, recipe, runner, stage
from cordee.artifact import Store

RECIPE = """
name: song
stages:
  choir:  {uses: toys.choir}
  report: {uses: eval.report, artifacts: [$choir], certificates: [$certificates]}
"""


@pytest.fixture
def load(write, tmp_path, monkeypatch):
    """Reads the recipe with overrides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "STAGE_PACKAGES", ("toys",))
    write("song.yaml", RECIPE)
    return lambda *overrides: recipe.load(Path("song.yaml"), overrides)


@pytest.fixture
def proven(load):
    """Proves the choir; returns the certificate's name, and those that the report would read."""

    def call(*overrides: str) -> tuple[str, list[str]]:
        store = Store(Path("runs"))
        ((with_proof, of),) = prove.plans(load(*overrides), store, "choir")
        made = runner.run(with_proof, Console(quiet=True), proves=of)["prove-choir-choir"]
        inputs = plan.make(load(*overrides), store).stage("report").inputs
        return made.name, [target.artifact.name for key, target in inputs.items() if key.startswith("certificates")]

    return call


FIRST, SECOND = "song/prove-choir-choir@1", "song/prove-choir-choir@2"


def test_a_proof_is_not_made_twice_while_nothing_changes(proven):
    assert proven() == proven() == (FIRST, [FIRST])


@pytest.mark.parametrize("override", ["choir.launch.num_processes=2", "choir.trouble=wait"])
def test_a_proof_is_made_anew_for_other_execution_keys_and_the_report_shows_the_newest(proven, override):
    proven()
    assert proven(override) == (SECOND, [SECOND])


def test_a_proof_is_made_anew_when_the_version_of_its_stage_is_raised(proven, monkeypatch):
    proven()
    monkeypatch.setattr("toys.choir.VERSION", 2, raising=False)
    assert proven() == (SECOND, [SECOND])


def test_a_proof_is_made_anew_when_the_accelerate_configuration_changes(proven, write):
    write("mine.yaml", "use_cpu: true\n")
    override = "choir.launch.config_file=mine.yaml"
    assert proven(override)[0] == proven(override)[0] == FIRST
    write("mine.yaml", "use_cpu: true\nnum_machines: 1\n")
    assert proven(override)[0] == SECOND


@pytest.mark.parametrize(
    ("where", "name", "other"),
    [
        (machine, "cpu", lambda: "Example CPU"),
        (machine, "gpu", lambda: "Example GPU"),
        (provenance, "_version", lambda package: "0.0" if package == "torch" else None),
    ],
)
def test_a_proof_is_made_anew_on_another_machine(proven, monkeypatch, where, name, other):
    monkeypatch.setattr(machine, "has_gpu", lambda: name == "gpu")
    monkeypatch.setattr(machine, "fast_precision", lambda: "float32")
    monkeypatch.setattr(machine, "gpu", lambda: None)
    proven()
    monkeypatch.setattr(where, name, other)
    assert proven()[0] == SECOND


def test_a_certificate_says_what_it_holds_for(proven):
    proven()
    found = certificate.read(Path("runs") / FIRST).conditions
    assert (found["version"], found["cpu"]) == (1, machine.cpu())
    assert found["execution"] == {"launch": {"num_processes": 1, "config_file": None}, "trouble": ""}
    assert found["packages"]["torch"]


def test_a_proof_that_was_interrupted_is_kept_by_clean(proven, load):
    proven()
    Path("runs", FIRST).rename(Path("runs", f"{FIRST}.partial"))
    for given in (None, load()):
        (found,) = clean.find(Store(Path("runs")), given)
        assert (found.path, found.why) == (Path("runs", f"{FIRST}.partial"), "can be resumed")
