"""A reader sees a whole artifact or none; every change to a published one is noticed."""

import manifests
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
    return artifact.publish(work, manifests.draft(stage=stage, fingerprint=fingerprint))


def test_what_is_published_is_whole_and_named(published):
    store, made = published
    assert made.name == "brook/spring@1"
    assert list(artifact.verify(made)) == []
    assert store.find("brook/spring@1") == made
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


def test_a_link_is_noticed_in_an_artifact_and_is_not_published(published, tmp_path):
    store, made = published
    (tmp_path / "elsewhere").mkdir()
    (made.path / "deep" / "link").symlink_to(tmp_path / "elsewhere")
    assert [line.endswith("deep/link: is not in the manifest") for line in artifact.verify(made)] == [True]
    work = store.work_folders("brook", "pool", "f3")
    work.out.mkdir()
    (work.out / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Fault, match=r"link: is a link, and an artifact holds its files itself"):
        artifact.publish(work, manifests.draft(stage="pool", fingerprint="f3"))


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


def begin(store, fingerprint, *written):
    """What an attempt leaves that is killed."""
    work = store.work_folders("brook", "spring", fingerprint)
    (work.out / "resume").mkdir(parents=True, exist_ok=True)
    work.logs.mkdir(parents=True, exist_ok=True)
    files.write_json(work.job, {"fingerprint": fingerprint})
    for name in written:
        (work.out / name).write_text("x")
    return work


def test_what_was_left_half_written_is_continued_only_under_the_same_fingerprint(tmp_path):
    store = Store(tmp_path / "runs")
    left = begin(store, "f1", "line.txt")
    assert store.work_folders("brook", "spring", "f1") == left
    assert left.fingerprint == "f1"
    assert store.work_folders("brook", "spring", "f2").version == 2
    assert store.scan() == []


def test_an_attempt_that_left_no_file_uses_up_no_number(tmp_path):
    store = Store(tmp_path / "runs")
    begin(store, "f1")
    assert [store.work_folders("brook", "spring", name).version for name in ("f1", "f2")] == [1, 1]
    begin(store, "f3", "line.txt")
    assert [store.work_folders("brook", "spring", name).version for name in ("f1", "f2", "f3")] == [2, 2, 1]


@pytest.mark.parametrize("content", ["{", "[]", '{"fingerprint": 3}', "\xff"])
def test_a_job_that_cant_be_read_is_of_no_attempt(tmp_path, content):
    store = Store(tmp_path / "runs")
    left = begin(store, "f1", "line.txt")
    left.job.write_bytes(content.encode("latin-1"))
    assert store.work_folders("brook", "spring", "f1").version == 2


def test_an_empty_folder_is_not_published(tmp_path):
    work = Store(tmp_path / "runs").work_folders("brook", "spring", "f1")
    work.out.mkdir(parents=True)
    with pytest.raises(Fault, match="the stage wrote nothing"):
        artifact.publish(work, manifests.draft())


def test_a_name_that_is_no_artifact_names_the_nearest(published):
    store, _ = published
    with pytest.raises(UserError, match="did you mean 'brook/spring@1'"):
        store.find("brook/sprang@1")


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
