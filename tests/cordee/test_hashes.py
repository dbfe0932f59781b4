"""A file is hashed once, and again as soon as it may have changed."""

import json
import os
import time

import manifests
import pytest
from rich.console import Console

from cordee import files, hashes, model_folder, plan, recipe, runner
from cordee.artifact import Store
from cordee.errors import Fault


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were read to be hashed."""
    names, own = [], files.sha256

    def counted(path):
        names.append(path.name)
        return own(path)

    monkeypatch.setattr(files, "sha256", counted)
    monkeypatch.setattr(hashes, "_known", {})
    return names


def settle(path):
    """Make a file an hour old."""
    then = time.time() - 3600
    os.utime(path, (then, then))
    return path


def test_a_file_that_stays_as_it_is_is_hashed_once(write, hashed):
    path = settle(write("a.txt", "a"))
    assert hashes.of_file(path) == hashes.of_file(path) == hashes.of_file(path.parent / "." / "a.txt")
    assert hashed == ["a.txt"]
    path.write_text("b")
    settle(path)
    assert hashes.of_file(path) == files.sha256(path)


def test_a_change_that_keeps_size_and_time_is_seen(write, hashed):
    path = settle(write("a.txt", "a"))
    before, state = hashes.of_file(path), path.stat()
    path.write_text("b")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert hashes.of_file(path) != before
    assert len(hashed) == 2


def test_a_linked_folder_is_a_part_of_the_content_and_a_link_upwards_is_no_end_of_it(write):
    inside = write("elsewhere/deep/a.txt", "a")
    folder = write("data/b.txt", "b").parent
    (folder / "train").symlink_to("../elsewhere")
    before = hashes.of_content(folder)
    (folder / "up").symlink_to("../data")
    (inside.parent / "round").symlink_to("..")
    (folder / "gone").symlink_to("nowhere")
    assert [path.relative_to(folder).as_posix() for path in files.walk(folder)] == ["b.txt", "train/deep/a.txt"]
    assert hashes.of_content(folder) == before
    inside.write_text("c")
    assert hashes.of_content(folder) != before


def test_the_hash_of_a_file_that_was_written_just_now_is_not_kept(write, hashed):
    path = write("a.txt", "a")
    assert hashes.of_file(path) == hashes.of_file(path)
    assert len(hashed) == 2


def test_another_process_trusts_what_it_is_told_and_only_that(write, hashed, monkeypatch):
    one, two = settle(write("in/a.txt", "a")), settle(write("in/b.txt", "b"))
    other = settle(write("inside.txt", "c"))
    found = [hashes.of_file(path) for path in (one, two, other)]
    told = json.loads(json.dumps(hashes.known([str(one.parent)])))
    assert {path.rpartition("/")[2] for path in told} == {"a.txt", "b.txt"}
    monkeypatch.setattr(hashes, "_known", {})
    hashes.trust(told)
    hashed.clear()
    assert [hashes.of_file(path) for path in (one, two, other)] == found
    assert hashed == ["inside.txt"]
    settle(write("in/a.txt", "A"))
    assert hashes.of_file(one) != found[0]


def test_a_flipped_bit_is_seen_in_spite_of_what_was_told(tmp_path, write, hashed):
    folder = tmp_path / "sft@1"
    weights = settle(write("sft@1/model.safetensors", "weights"))
    manifests.seal(folder)
    hashes.of_content(folder)
    hashed.clear()
    model_folder.require_undamaged(folder)
    assert hashed == []
    weights.write_text("weighty")
    with pytest.raises(Fault, match=r"model.safetensors: is damaged"):
        model_folder.require_undamaged(folder)


def test_a_run_hashes_an_artifact_once_and_tells_its_readers(write, tmp_path, monkeypatch, hashed):
    monkeypatch.chdir(tmp_path)
    settle(write("rock/rock.txt", "rock"))
    stages = "{one: {uses: toys.spring, source: rock}, two: {uses: toys.spring, source: $one/line.txt, text: wine}}"
    file = write("brook.yaml", f"name: brook\nstages: {stages}")
    planned = plan.make(recipe.load(file), Store(tmp_path / "runs"))
    runner.run(planned, Console(quiet=True))
    assert hashed.count("rock.txt") == 1, "planned and verified in one process"
    (told,) = json.loads((tmp_path / "runs/brook/logs/one@1/job.json").read_text())["hashes"].items()
    assert (told[0], told[1][-1]) == (str(tmp_path / "rock/rock.txt"), files.sha256(tmp_path / "rock/rock.txt"))
    hashed.clear()
    monkeypatch.setattr(hashes, "_known", {})
    assert plan.make(recipe.load(file), Store(tmp_path / "runs")).stage("one").state == "done"
    assert hashed == [], "kept for the next plan"
