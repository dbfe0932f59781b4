"""A reader sees a whole artifact or none; every change to a published one is noticed."""

import shutil

import pytest

from cordee import artifact, files
from cordee.artifact import Store
from cordee.errors import Fault, UserError


@pytest.fixture
def published(tmp_path):
    store = Store(tmp_path / "runs")
    return store, publish(store, "spring", "f1")


def publish(store, stage, fingerprint):
    work = store.work_folders("brook", stage, fingerprint)
    (work.out / "deep").mkdir(parents=True)
    (work.out / "deep" / "line.txt").write_text("water")
    (work.out / "other.txt").write_text("more")
    return artifact.publish(work, {"recipe": "brook", "stage": stage, "fingerprint": fingerprint})


def test_what_is_published_is_whole_and_named(published):
    store, made = published
    assert made.name == "brook/spring@1"
    assert list(artifact.verify(made)) == []
    assert store.open("brook/spring@1") == made
    assert not made.path.with_name("spring@1.partial").exists()


def test_a_new_identity_gets_the_next_version_beside_the_old(published):
    store, first = published
    second = publish(store, "spring", "f2")
    assert (second.name, first.path.exists()) == ("brook/spring@2", True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "other.txt").write_text("mere"), "content differs"),
        (lambda path: (path / "other.txt").write_text("m"), "has 1 bytes, the manifest says 4"),
        (lambda path: (path / "other.txt").unlink(), "is missing"),
        (lambda path: (path / "new.txt").write_text("x"), "is not in the manifest"),
    ],
)
def test_every_change_is_noticed_by_the_hashes(published, damage, message):
    _, made = published
    damage(made.path)
    (line,) = artifact.verify(made)
    assert message in line


def test_what_was_put_beside_an_artifacts_files_is_no_place_in_it(published):
    _, made = published
    (made.path / "deep" / "extra.txt").write_text("x")
    assert [line.endswith("extra.txt: is not in the manifest") for line in artifact.verify(made, "deep")] == [True]
    assert [line.endswith("is not in the manifest") for line in artifact.verify(made, "deep/extra.txt")] == [True]
    with pytest.raises(UserError, match=r"r.yaml: data: brook/spring@1 has no 'deep/extra.txt'; did you mean"):
        made.at("deep/extra.txt", file="r.yaml", key="data")
    assert made.at("deep") == made.path / "deep"


def test_one_flipped_bit_is_noticed(published):
    _, made = published
    path = made.path / "deep" / "line.txt"
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)
    assert [line.endswith("SHA-256") for line in artifact.verify(made, "deep")] == [True]
    assert list(artifact.verify(made, "other.txt")) == []


def test_what_was_left_half_written_is_gone_on_with_only_under_the_same_fingerprint(tmp_path):
    store = Store(tmp_path / "runs")
    left = store.work_folders("brook", "spring", "f1")
    left.out.mkdir(parents=True)
    left.logs.mkdir(parents=True)
    files.write_json(left.job, {"fingerprint": "f1"})
    assert store.work_folders("brook", "spring", "f1") == left
    assert store.work_folders("brook", "spring", "f2").version == 2
    assert list(store.artifacts("brook")) == []


def test_an_empty_folder_is_not_published(tmp_path):
    work = Store(tmp_path / "runs").work_folders("brook", "spring", "f1")
    work.out.mkdir(parents=True)
    with pytest.raises(Fault, match="the stage wrote nothing"):
        artifact.publish(work, {"recipe": "brook", "stage": "spring", "fingerprint": "f1"})


def test_a_renamed_artifact_is_refused(published):
    store, made = published
    shutil.move(made.path, made.path.with_name("other@1"))
    with pytest.raises(Fault, match="belongs to another artifact"):
        list(store.artifacts("brook"))


def test_a_name_that_is_no_artifact_names_the_nearest(published):
    store, _ = published
    with pytest.raises(UserError, match="did you mean 'brook/spring@1'"):
        store.open("brook/sprang@1")


def test_a_store_that_is_a_file_is_one_line(tmp_path, cordee):
    (tmp_path / "runs").write_text("")
    told = cordee("verify", "--runs", "runs")
    assert (told.returncode, told.stderr) == (2, "cordee: runs: --runs: is a file, not a folder of artifacts\n")


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    assert files.read_json(path) == {"a": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_line_that_was_cut_off_is_not_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert files.read_json_lines(path) == [{"a": 1}, {"a": 2}]
