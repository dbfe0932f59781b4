"""The plan says what is done, what is stale and why, and what it will cost."""

import json
from dataclasses import replace
from pathlib import Path

import manifests
import pytest
from rich.console import Console

from cordee import machine, plan, recipe, runner, show
from cordee.artifact import Store
from cordee.config import AccelerateConfig
from cordee.cost import Cost
from cordee.errors import Fault, UserError

ROOT = Path(__file__).resolve().parents[2]
BROOK = """
name: brook
stages:
  spring: {uses: toys.spring, source: rock.txt}
  pool:   {uses: toys.spring, source: $spring/line.txt}
"""


@pytest.fixture
def brook(tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("rock.txt", "rock\n")
    path = write("brook.yaml", BROOK)

    def make(*overrides: str) -> plan.Plan:
        return plan.make(recipe.load(path, overrides), Store(tmp_path / "runs"))

    return make


def states(made: plan.Plan) -> dict[str, str]:
    return {planned.name: planned.state for planned in made.stages}


def run(made: plan.Plan) -> None:
    runner.run(made, Console(quiet=True))


def test_a_stage_goes_from_ready_to_done_to_stale(brook):
    assert states(brook()) == {"spring": "ready", "pool": "ready"}
    run(brook())
    assert states(brook()) == {"spring": "done", "pool": "done"}
    changed = brook("pool.number=2")
    assert states(changed) == {"spring": "done", "pool": "stale"}
    assert changed.stage("pool").why == ("number 1.0 → 2",) or changed.stage("pool").why == ("number 1.0 → 2.0",)


def test_what_follows_from_a_change_is_stale_and_says_from_where(brook):
    run(brook())
    changed = brook("spring.text=wine")
    assert changed.stage("spring").why == ('text "water" → "wine"',)
    assert changed.stage("pool").why == ("source: follows spring",)


def test_an_execution_key_makes_nothing_stale(brook):
    run(brook())
    assert set(states(brook("spring.trouble=wait")).values()) == {"done"}


def test_a_files_content_counts_and_not_its_name_or_time(brook, tmp_path):
    run(brook())
    (tmp_path / "rock.txt").rename(tmp_path / "stone.txt")
    assert set(states(brook("spring.source=stone.txt")).values()) == {"done"}
    (tmp_path / "stone.txt").write_text("sand\n")
    changed = brook("spring.source=stone.txt")
    assert states(changed)["spring"] == "stale"
    assert changed.stage("spring").why[0].startswith("source content ")


def test_going_back_to_an_old_identity_finds_the_old_version(brook):
    run(brook())
    run(brook("pool.number=2"))
    assert brook().stage("pool").artifact.name == "brook/pool@1"
    assert brook("pool.number=2").stage("pool").artifact.name == "brook/pool@2"


def test_another_recipe_does_not_do_the_same_work_again(brook):
    run(brook())
    other = brook("name=stream")
    assert states(other) == {"spring": "done", "pool": "done"}
    assert other.stage("pool").artifact.name == "brook/pool@1"


def test_the_seed_is_part_of_every_identity(brook):
    run(brook())
    assert brook("seed=1").stage("spring").why == ("seed 0 → 1",)


def test_a_raised_version_of_the_code_makes_its_stages_stale(brook, monkeypatch):
    run(brook())
    monkeypatch.setattr("toys.spring.VERSION", 2, raising=False)
    changed = brook()
    assert changed.stage("spring").why == ("version 1 → 2",)
    monkeypatch.setattr("toys.spring.VERSION", "2")
    with pytest.raises(UserError, match=r"stages.spring.uses: VERSION of toys.spring must be a whole number, not '2'"):
        brook()


def test_cost_is_told_before_and_measured_after(brook):
    assert brook().stage("spring").cost.tokens == len("water")
    run(brook())
    assert brook().stage("spring").cost.seconds > 0
    assert brook("pool.number=3").stage("pool").cost.rows == 1, "what an artifact measured is given to the next stage"


def test_a_time_follows_from_the_largest_run_and_is_no_less_than_the_shortest(brook, tmp_path):
    run(brook())
    for name, flops, seconds in (("spring", 1e12, 100.0), ("pool", 1e9, 8.0)):
        manifests.change(tmp_path / f"runs/brook/{name}@1", seconds=seconds, metrics={"flops": flops})
    measured = show._measured(brook())
    (spring, _) = brook("spring.number=2").stages

    def time(flops: float) -> str:
        return show._time(replace(spring, cost=Cost(flops=flops)), measured)

    assert (time(5e11), time(2e12), time(1e6)) == ("~50.0 s", "~3 min 20 s", "~8.0 s")


def test_without_a_measurement_a_time_follows_from_the_devices(brook):
    class Trained(AccelerateConfig):
        pass

    (spring, _) = brook().stages
    launch = {"config_file": str(ROOT / "configs/accelerate/gpu.yaml"), "num_processes": 4}
    trained = replace(spring, config=Trained(launch=launch), cost=Cost(flops=1.2e17))
    assert show._time(trained, {}, for_gpus=True) == "≈1 min 40 s", "4 GPUs, 3e14 FLOP/s each"
    assert show._time(replace(spring, cost=Cost(flops=3e15)), {}, for_gpus=True) == "≈10.0 s", "one GPU"
    made = replace(brook(), stages=(trained, spring))
    assert show._is_for_gpus(made)
    assert show._is_for_gpus(brook()) == machine.has_gpu()
    assert "3e14 FLOP/s a GPU, 30 % of an H100's peak" in show._assumed(made)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("spring.source=rok.txt", "stages.spring.source: no file or folder 'rok.txt'; did you mean 'rock.txt'?"),
        ("spring.source=brook/spring@9", "no artifact 'brook/spring@9'"),
    ],
)
def test_an_input_that_is_not_there_is_one_line(brook, override, message):
    with pytest.raises(UserError) as caught:
        brook(override)
    assert message in str(caught.value)


@pytest.mark.parametrize(("target", "hint"), [("far/rock.txt", "`make far/rock.txt` makes it"), ("far", "looked in")])
def test_what_the_makefile_makes_is_told(brook, write, target, hint):
    write("Makefile", f"all: {target}\n\n{target}: | far\n\ttouch $@\n")
    with pytest.raises(UserError, match=f"no file or folder 'far/rock.txt'; {hint}"):
        brook("spring.source=far/rock.txt")


def test_a_place_that_an_artifact_does_not_have_names_the_nearest(brook):
    run(brook())
    with pytest.raises(UserError, match=r"has no 'lime.txt'; did you mean 'line.txt'\?"):
        brook("pool.source=$spring/lime.txt")
    with pytest.raises(UserError, match=r"has no 'lime.txt'; did you mean 'line.txt'\?"):
        brook("pool.source=brook/spring@1/lime.txt")


def test_a_file_that_was_put_into_an_artifact_is_no_part_of_it(brook, tmp_path):
    run(brook())
    (tmp_path / "runs/brook/spring@1/extra.txt").write_text("salt")
    with pytest.raises(UserError, match=r"stages.pool.source: brook/spring@1 has no 'extra.txt'"):
        brook("pool.source=$spring/extra.txt")


@pytest.mark.parametrize("source", ["runs/brook/spring@1/line.txt", "lake/../runs/brook/spring@1/line.txt", "link"])
def test_a_path_into_an_artifact_is_a_reference_to_it(brook, tmp_path, source):
    (tmp_path / "lake").mkdir()
    (tmp_path / "link").symlink_to("runs/brook/spring@1/line.txt")
    run(brook())
    made = brook("name=lake", f"pool.source={source}")
    assert states(made)["pool"] == "done"
    found = made.stage("pool").inputs["source"]
    assert (found.artifact.name, found.place) == ("brook/spring@1", "line.txt")
    (tmp_path / "runs/brook/spring@1/extra.txt").write_text("salt")
    with pytest.raises(UserError, match=r"stages.pool.source: brook/spring@1 has no 'extra.txt'"):
        brook("pool.source=runs/brook/spring@1/extra.txt")


def test_a_path_into_another_store_counts_by_its_content(brook, tmp_path):
    run(brook())
    (tmp_path / "runs").rename(tmp_path / "old")
    source = brook("spring.source=old/brook/spring@1/line.txt").stage("spring").inputs["source"]
    assert (source.artifact, source.identity.partition(" ")[0]) == (None, "content")


@pytest.mark.parametrize("place", ["$spring/../spring@1/line.txt", "brook/spring@1/../spring@1/line.txt", "$spring/.."])
def test_no_reference_leads_out_of_its_artifact(brook, place):
    run(brook())
    with pytest.raises(UserError, match=r"stages.pool.source: .* leads out of the artifact; name another"):
        brook(f"pool.source={place}")


def test_the_certificates_are_no_single_artifact(brook):
    with pytest.raises(UserError, match=r"stages.pool.source: \$certificates is no single artifact; use it in"):
        brook("pool.source=$certificates")


@pytest.mark.parametrize("source", ["rock.txt", "."])
@pytest.mark.parametrize("change", [lambda path: path.write_text("sand\n"), lambda path: path.unlink()])
def test_a_file_that_changes_after_the_plan_is_noticed_when_its_stage_starts(brook, write, tmp_path, source, change):
    write("quarry/rock.txt", "rock\n")
    made = brook(f"spring.source=quarry/{source}")
    change(tmp_path / "quarry" / "rock.txt")
    with pytest.raises(Fault, match=r"stages.spring.source: .*quarry.* changed since the plan was made; run again"):
        run(made)
    assert not (tmp_path / "runs/brook/logs/spring@1/job.json").exists()


def test_a_link_keeps_its_own_name(brook, write, tmp_path):
    write("blobs/abc", "rock\n")
    (tmp_path / "train.parquet").symlink_to("blobs/abc")
    made = brook("spring.source=train.parquet")
    assert made.stage("spring").inputs["source"].path == tmp_path / "train.parquet"
    run(made)
    job = json.loads((tmp_path / "runs/brook/logs/spring@1/job.json").read_text())
    assert job["config"]["source"] == str(tmp_path / "train.parquet")


def test_frozen_refuses_any_difference(brook):
    run(brook())
    runner.require_frozen(brook())
    with pytest.raises(UserError, match=r"stages.pool: is stale: number 1.0 → 2"):
        runner.require_frozen(brook("pool.number=2"))


def test_a_manifest_says_all_that_it_came_from(brook, tmp_path):
    run(brook())
    manifest = json.loads((tmp_path / "runs/brook/pool@1/manifest.json").read_text())
    assert manifest["inputs"][0] | {"fingerprint": ""} == {
        "key": "source", "artifact": "brook/spring@1", "path": "line.txt", "fingerprint": "", "file": "", "sha256": "",
    }  # fmt: skip
    assert manifest["metrics"] == {"rows": 1, "tokens": 5}
    assert {item["path"] for item in manifest["files"]} == {"first.txt", "line.txt", "metrics.jsonl"}
    assert manifest["packages"]["pydantic"]
    assert manifest["peak_memory_bytes"] > 1e6
    assert manifest["execution"] == {"trouble": ""}
