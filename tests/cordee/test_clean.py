"""`cordee clean` deletes what no run will use again, keeps what can be resumed, and deletes nothing unasked."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from cordee import clean, lock, plan, recipe, runner
from cordee.artifact import Store
from cordee.errors import Fault


@pytest.fixture
def brook(brook, tmp_path, monkeypatch, cordee):
    """A store with `spring@1`, an attempt at `pool` that was killed, and one of it with another text."""
    monkeypatch.chdir(tmp_path)
    assert cordee("run", brook, "pool.trouble=kill", "pool.text=wine").returncode == 1
    assert cordee("run", brook, "pool.trouble=kill").returncode == 1
    return Store(Path("runs"))


def items(store, *overrides, is_given=True):
    found = clean.find(store, recipe.load(Path("brook.yaml"), overrides) if is_given else None)
    return {(str(item.path.relative_to(store.root)), item.is_kept): item.why for item in found}


WINE, WATER = "brook/pool@1.partial", "brook/pool@2.partial"
OTHER = "no stage has its fingerprint now"


def forget(store, text):
    """Delete the stored recipes that hold a text."""
    for stored in (store.root / "brook/logs").glob("*.recipe.yaml"):
        if text in stored.read_text():
            stored.unlink()


def test_what_can_be_resumed_is_kept_and_another_attempt_goes_with_its_log(brook, cordee):
    log = ("brook/logs/pool@1", False)
    resumable = dict.fromkeys([(WINE, True), (WATER, True)], "can be resumed")
    assert items(brook) == items(brook, is_given=False) == resumable, "each recipe that was run counts, with overrides"
    forget(brook, "wine")
    assert items(brook, "pool.text=wine") == resumable
    assert items(brook) == {(WATER, True): "can be resumed", log: "its log", (WINE, False): OTHER}
    told = cordee("clean", "brook.yaml")
    assert (told.returncode, "2 to delete" in told.stdout, "1 kept" in told.stdout) == (0, True, True)
    assert (brook.root / WINE).exists()
    assert cordee("clean", "brook.yaml", "--yes").returncode == 0
    assert not (brook.root / WINE).exists()
    assert not (brook.root / log[0]).exists()
    assert items(brook) == {(WATER, True): "can be resumed"}
    done = cordee("run", "brook.yaml")
    assert "starts as brook/pool@2" in done.stdout
    assert items(brook) == {}
    assert cordee("verify").returncode == 0


def test_of_two_runs_in_one_second_both_recipes_are_stored(brook):
    before = len(list((brook.root / "brook/logs").glob("*.recipe.yaml")))
    for override in ("pool.text=salt", "pool.text=sand"):
        runner.keep_recipe(plan.make(recipe.load(Path("brook.yaml"), [override]), brook))
    assert len(list((brook.root / "brook/logs").glob("*.recipe.yaml"))) == before + 2


def test_what_was_published_meanwhile_is_not_resumed(brook, cordee):
    assert cordee("run", "brook.yaml", "name=stream").returncode == 0
    assert items(brook)[WATER, False] == "is published as stream/pool@1"


def test_an_attempt_without_a_job_can_not_be_continued(brook):
    (brook.root / "brook/logs/pool@2/job.json").write_text("{")
    assert items(brook)[WATER, False] == "has no job that could be continued"


def test_without_a_recipe_all_that_were_run_here_count(brook, monkeypatch):
    monkeypatch.setattr("toys.spring.VERSION", 2, raising=False)
    assert items(brook, is_given=False)[WATER, False] == OTHER
    newest = max((brook.root / "brook/logs").glob("*.recipe.yaml"))
    newest.write_text(newest.read_text().replace("toys.spring", "toys.gone"))
    kept = items(brook, is_given=False)
    assert "a recipe that was run here can't be planned: " in kept[WATER, True]
    assert (WINE, True) in kept
    forget(brook, "")
    assert items(brook, is_given=False)[WINE, True].startswith("no recipe was stored here")


def test_an_attempt_that_runs_is_left_alone(brook):
    held = brook.lock_file("brook", "pool")
    with lock.hold(held):
        assert items(brook) == {
            (WINE, True): "a run holds its stage", (WATER, True): "a run holds its stage",
        }  # fmt: skip
    held.write_text(json.dumps({"host": os.uname().nodename, "pid": 1, "started": "never"}))
    assert items(brook)["brook/.pool.lock", False] == "lock of a process that has ended"
    for item in clean.find(brook, recipe.load(Path("brook.yaml"))):
        if not item.is_kept:
            clean.delete(item)
    assert not held.exists()


def test_a_lock_that_was_taken_since_it_was_found_dead_is_left_alone(brook):
    held = brook.lock_file("brook", "pool")
    held.write_text(json.dumps({"host": os.uname().nodename, "pid": 1, "started": "never"}))
    (item,) = (item for item in clean.find(brook, None) if item.path == held)
    with lock.hold(held):
        with pytest.raises(Fault, match="another run holds this stage"):
            clean.delete(item)
        assert json.loads(held.read_text())["pid"] == os.getpid()
    left = held.with_name(f"{held.name}.dead.elsewhere.1")
    left.write_text(json.dumps({"host": os.uname().nodename, "pid": 1, "started": "never"}))
    (item,) = (item for item in clean.find(brook, None) if item.path == left)
    clean.delete(item)
    assert not left.exists()


def age(path, days):
    then = time.time() - days * 86400
    os.utime(path, (then, then))


def test_leftovers_damaged_artifacts_and_old_caches(brook):
    shutil.rmtree(brook.root / WATER)
    for name, days in (
        (".a.json.1.tmp", 1),
        ("logs/.b.json.1.tmp", 0),
        ("../.cache/old/x", 40),
        ("../.cache/new/x", 1),
        ("../.cache/sequences/old/x", 40),
        ("../.cache/sequences/new/x", 1),
        ("../.cache/answers/old/x", 40),
    ):
        path = brook.root / "brook" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        age(path, days)
    (brook.root / "brook/spring@1/manifest.json").write_text("{")
    for folder in ("old", "new", "sequences/old", "sequences/new", "sequences", "answers/old"):
        age(brook.root / ".cache" / folder, 40)
    found = items(brook, is_given=False)
    assert found["brook/logs/pool@2", False] == "log of an attempt that is gone"
    assert found["brook/.a.json.1.tmp", False] == "was not finished"
    assert found[".cache/old", False] == found[".cache/sequences/old", False] == "cache not used for 40 days"
    assert found[".cache/answers/old", False] == "cache not used for 40 days"
    assert (".cache/sequences", False) not in found
    assert (".cache/answers", False) not in found
    assert "manifest.json is damaged" in found["brook/spring@1", True]
    assert not any("new" in path or ".b.json" in path for path, _ in found)


def test_sizes_and_an_empty_store(brook, cordee, tmp_path):
    (brook.root / WINE / "weights").write_bytes(bytes(2_345_678))
    assert "2.35 MB" in cordee("clean", "brook.yaml").stdout
    assert "0 to delete, 0 B; 0 kept" in cordee("clean", "--runs", str(tmp_path / "none")).stdout


def test_the_version(cordee):
    told = cordee("--version")
    assert (told.returncode, told.stdout) == (0, "cordee 0.1.0\n")
