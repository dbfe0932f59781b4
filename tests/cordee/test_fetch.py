"""`cordee fetch` against a server of the hub's paths: what is fetched, locked, planned and run, and what goes wrong."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import pytest
from rich.console import Console

from cordee import fetch as fetching
from cordee import hub as hub_references
from cordee import plan, recipe, runner
from cordee.artifact import Store
from cordee.errors import UserError

HEADER = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
WEIGHTS = struct.pack("<Q", len(HEADER)) + HEADER + bytes(8)
CHATS = "".join(json.dumps({"text": f"row {row}"}) + "\n" for row in range(20))
MODEL = {"config.json": '{"model_type": "llama"}', "tokenizer.json": "{}", "model.safetensors": WEIGHTS}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with a model and a data set; the test stands in a folder of its own, with a cache of its own."""
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with hub_server.serve(tmp_path / "served") as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        served.write("models/org/model", {**MODEL, "pytorch_model.bin": b"never", "chat_template.jinja": "{{ x }}"})
        served.write("datasets/org/chats", {"README.md": "# Chats\n", "data/train.jsonl": CHATS, "load.py": "never"})
        yield served


@pytest.fixture
def fetch(cordee):
    """`cordee fetch r.yaml`."""
    return lambda *options: cordee("fetch", "r.yaml", *options, cwd=Path.cwd())


def write(**sources):
    """A recipe whose stages read these."""
    stages = {name: {"uses": "toys.spring", "source": source} for name, source in sources.items()}
    Path("r.yaml").write_text(json.dumps({"name": "r", "stages": stages}))


def planned():
    return plan.make(recipe.load(Path("r.yaml")), Store(Path("runs")))


def lock():
    return json.loads(Path("r.lock.json").read_text())


def lines(done):
    return [line for line in done.stderr.splitlines() if line.startswith("cordee: ")]


def test_what_is_fetched_is_planned_and_run_without_a_network(hub, fetch):
    write(model="hub:org/model", template="hub:org/model/chat_template.jinja", data="hub:datasets/org/chats@main/data")
    done = fetch()
    assert done.returncode == 0, done.stderr
    assert [line.partition(": commit")[0] for line in done.stdout.splitlines()] == [
        "hub:org/model", "hub:org/model/chat_template.jinja", "hub:datasets/org/chats@main/data"
    ]  # fmt: skip
    assert not [name for name in hub.asked if name.endswith((".bin", ".py", "README.md"))]
    commit = hub.commit("models", "org/model")
    assert lock()["folder"] is None
    assert {name: entry["commit"] for name, entry in lock()["references"].items()} == {
        "hub:org/model": commit,
        "hub:org/model/chat_template.jinja": commit,
        "hub:datasets/org/chats@main/data": hub.commit("datasets", "org/chats"),
    }
    files = lock()["references"]["hub:org/model"]["files"]
    assert set(files) == {*MODEL, "chat_template.jinja"}
    assert files["model.safetensors"]["bytes"] == len(WEIGHTS)
    hub.asked.clear()
    shutil.rmtree(hub.root)
    again = fetch()
    assert (again.returncode, again.stdout, hub.asked) == (0, done.stdout, [])
    made = runner.run(planned(), Console(quiet=True))
    assert made["model"].manifest.inputs[0].file == f"hub:org/model@{commit}"
    assert {stage.state for stage in planned().stages} == {"done"}
    assert len(list(Path("runs/r/logs").glob("*.recipe.lock.json"))) == 1


@pytest.mark.usefixtures("hub")
def test_the_same_bytes_elsewhere_are_the_same_artifact(fetch):
    write(model="hub:org/model", data="hub:datasets/org/chats")
    assert fetch().returncode == 0
    before = [stage.fingerprint for stage in planned().stages]
    done = fetch("--to", "there")
    assert done.returncode == 0, done.stderr
    assert lock()["folder"] == "there"
    assert [stage.fingerprint for stage in planned().stages] == before
    assert sorted(str(path.relative_to("there")) for path in Path("there").rglob("*") if path.is_file()) == [
        *(
            "datasets/org/chats/README.md",
            "datasets/org/chats/data/train.jsonl",
            "models/org/model/chat_template.jinja",
        ),
        *(f"models/org/model/{name}" for name in sorted(MODEL)),
    ]
    assert fetch().stdout == done.stdout
    write(model="there/models/org/model", data="there/datasets/org/chats")
    assert [stage.fingerprint for stage in planned().stages] == before


@pytest.mark.usefixtures("hub")
def test_all_that_is_not_fetched_is_named():
    write(model="hub:org/model", data="hub:datasets/org/chats@v1", again="hub:org/model")
    with pytest.raises(UserError) as caught:
        planned()
    assert str(caught.value) == (
        "r.yaml: not fetched: hub:org/model (stages.model.source), hub:datasets/org/chats@v1 (stages.data.source);"
        " `cordee fetch r.yaml` fetches what is missing, where there is a network"
    )
    write(model="org/model")
    with pytest.raises(UserError, match=r"'org/model'; .*write hub:org/model and run `cordee fetch r\.yaml`"):
        planned()
    write(model="absent/chats.jsonl")
    with pytest.raises(UserError, match=r"'absent/chats\.jsonl'; looked in [^;]*$"):
        planned()


def test_each_refusal_is_a_line_and_the_rest_is_fetched(hub, fetch, monkeypatch):
    hub.write("models/org/gated", MODEL)
    hub.gated.add("org/gated")
    hub.write("models/org/pickled", {"config.json": "{}", "pytorch_model.bin": b"never"})
    write(gated="hub:org/gated", absent="hub:org/nothing", revision="hub:org/model@v9", file="hub:org/model/a.txt",
          pickled="hub:org/pickled", data="hub:datasets/org/chats")  # fmt: skip
    done = fetch()
    assert done.returncode == 2
    assert list(lock()["references"]) == ["hub:datasets/org/chats"]
    told = [line.removeprefix("cordee: r.yaml: stages.") for line in lines(done)]
    assert [line.partition(";")[0] for line in told] == [
        "gated.source: hub:org/gated is gated: its owner has not given access",
        "absent.source: hub:org/nothing is not on the hub, or HF_TOKEN gives no access to it",
        "revision.source: hub:org/model@v9 has no such revision",
        "file.source: hub:org/model/a.txt holds no a.txt that is fetched",
        "pickled.source: hub:org/pickled has no safetensors",
    ]
    assert done.stderr.count("\n") == len(told)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    write(gated="hub:org/gated")
    done = fetch()
    assert done.returncode == 0, done.stderr


def test_a_transfer_that_breaks_is_one_line_and_goes_on_with_what_is_missing(hub, fetch):
    write(data="hub:datasets/org/chats", model="hub:org/model")
    hub.short.add("tokenizer.json")
    done = fetch()
    assert (done.returncode, len(lines(done))) == (1, 1)
    assert "stages.model.source: hub:org/model: broken transfer: " in lines(done)[0]
    assert "run it again" in lines(done)[0]
    assert list(lock()["references"]) == ["hub:datasets/org/chats"]
    hub.short.clear()
    hub.asked.clear()
    assert fetch().returncode == 0
    assert hub.asked == ["org/model/tokenizer.json"]


def test_what_comes_damaged_is_fetched_once_more(hub, fetch):
    write(model="hub:org/model", data="hub:datasets/org/chats")
    hub.flipped = {"model.safetensors": 1, "README.md": 1}
    hub.cut.add("data/train.jsonl")
    done = fetch("--to", "there")
    assert done.returncode == 0, done.stderr
    assert Path("there/models/org/model/model.safetensors").read_bytes() == WEIGHTS
    assert Path("there/datasets/org/chats/data/train.jsonl").read_text() == CHATS
    shutil.rmtree("there")
    hub.flipped = {"config.json": 9}
    done = fetch()
    problem = "broken transfer: config.json came twice with another content than the hub lists"
    assert (done.returncode, problem in lines(done)[0]) == (1, True)
    assert not Path("there/models/org/model/config.json").exists()


def test_no_space_is_one_line_before_anything_comes(hub, fetch):
    write(model="hub:org/model")
    hub.sizes["model.safetensors"] = 10**18
    done = fetch()
    assert (done.returncode, len(lines(done)), hub.asked) == (1, 1, [])
    assert "no space left on the disk: 1,000,000 TB are to come, " in lines(done)[0]


def test_a_disk_that_is_full_midway_is_one_line():
    full = OSError(errno.ENOSPC, "No space left on device", "there")
    told = fetching._error(hub_references.parse("hub:org/model", None, ""), full)
    assert str(told) == "there: no space left on the disk; free some, then run again"


@pytest.mark.usefixtures("hub")
def test_what_was_changed_since_is_named_and_fetched_again(fetch):
    write(model="hub:org/model", data="hub:datasets/org/chats")
    assert fetch("--to", "there").returncode == 0
    model, data = Path("there/models/org/model"), Path("there/datasets/org/chats")
    (model / "config.json").write_text('{"model_type": "LLAMA"}')
    (model / "tokenizer.json").unlink()
    (data / "data" / "more.jsonl").write_text(CHATS)
    with pytest.raises(UserError) as caught:
        planned()
    told = (
        "hub:org/model (stages.model.source: tokenizer.json is missing; config.json is changed), hub:datasets/org/chats"
    )
    assert f"not fetched: {told} (stages.data.source: data/more.jsonl is not of that revision)" in str(caught.value)
    done = fetch()
    assert (done.returncode, len(lines(done))) == (2, 1)
    assert "there/datasets/org/chats: data/more.jsonl is not of that revision; delete it, or" in lines(done)[0]
    (data / "data" / "more.jsonl").unlink()
    assert fetch().returncode == 0
    assert planned()


def test_a_commit_stays_until_it_is_updated(hub, fetch):
    write(model="hub:org/model")
    assert fetch().returncode == 0
    first, before = lock(), planned().stages[0].fingerprint
    hub.write("models/org/model", {"config.json": '{"model_type": "qwen3"}'})
    write(model="hub:org/model", template="hub:org/model/chat_template.jinja")
    assert fetch().returncode == 0
    commits = {entry["commit"] for entry in lock()["references"].values()}
    assert commits == {first["references"]["hub:org/model"]["commit"]}, "of one repository and revision, one commit"
    assert planned().stages[0].fingerprint == before
    hub.asked.clear()
    assert fetch("--update").returncode == 0
    assert {entry["commit"] for entry in lock()["references"].values()} == {hub.commit("models", "org/model")}
    assert hub.asked == ["org/model/config.json"], "what did not change is in the cache"
    assert planned().stages[0].fingerprint != before


def test_a_reference_that_is_gone_does_not_bring_its_commit_back(hub, fetch):
    write(file="hub:datasets/org/chats/data/train.jsonl", folder="hub:datasets/org/chats/data")
    assert fetch().returncode == 0
    hub.write("datasets/org/chats", {"data/train.jsonl": CHATS + CHATS})
    write(file="hub:datasets/org/chats/data/train.jsonl")
    assert fetch("--update").returncode == 0
    assert fetch().returncode == 0
    entry = lock()["references"]["hub:datasets/org/chats/data/train.jsonl"]
    assert entry["commit"] == hub.commit("datasets", "org/chats")


def test_what_a_repository_has_no_more_leaves_the_folder(hub, fetch):
    write(data="hub:datasets/org/chats")
    assert fetch("--to", "there").returncode == 0
    data = hub.root / "datasets/org/chats/data"
    (data / "train.jsonl").rename(data / "train-00000-of-00001.jsonl")
    done = fetch("--update")
    assert done.returncode == 0, done.stderr
    (there,) = Path("there/datasets/org/chats/data").iterdir()
    assert there.name == "train-00000-of-00001.jsonl"
    assert planned()


def test_two_revisions_lie_in_the_cache_not_in_one_folder(hub, fetch):
    first = hub.commit("models", "org/model")
    hub.write("models/org/model", {"config.json": '{"model_type": "qwen3"}'})
    write(before=f"hub:org/model@{first}", after="hub:org/model")
    assert fetch().returncode == 0
    assert len({stage.fingerprint for stage in planned().stages}) == 2
    done = fetch("--to", "there")
    assert (done.returncode, len(lines(done))) == (2, 2)
    assert "hub:org/model: a folder holds one commit of a repository, not several" in lines(done)[1]


def test_a_fetch_that_is_killed_goes_on(hub, fetch):
    write(data="hub:datasets/org/chats", model="hub:org/model")
    hub.slow.add("tokenizer.json")
    command = [sys.executable, "-P", "-c", "from cordee.cli import main; main()", "fetch", "r.yaml", "--to", "there"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while "org/model/tokenizer.json" not in hub.asked and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    hub.released.set()
    assert list(lock()["references"]) == ["hub:datasets/org/chats"]
    hub.slow.clear()
    hub.asked.clear()
    assert fetch("--to", "there").returncode == 0
    assert hub.asked == ["org/model/tokenizer.json"]
    assert not Path("there/models/org/model/.cache").exists()


@pytest.mark.usefixtures("hub")
def test_without_a_network_it_is_one_line(fetch, monkeypatch):
    write(model="hub:org/model")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = fetch()
    assert (done.returncode, len(lines(done))) == (1, 1)
    assert "the hub can't be reached" in lines(done)[0]


@pytest.mark.usefixtures("hub")
def test_what_others_have_fetched_into_the_cache_is_found(fetch, tmp_path):
    write(model="hub:org/model", data="hub:datasets/org/chats/data")
    assert fetch().returncode == 0
    before = [stage.fingerprint for stage in planned().stages]
    Path("r.lock.json").unlink()
    with pytest.raises(UserError, match="not fetched: hub:org/model"):
        planned()
    for folder in (tmp_path / "home" / "hub").glob("*--org--*"):
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(next((folder / "snapshots").iterdir()).name)
    (tmp_path / "home/hub/models--org--model/snapshots").glob("*").__next__().joinpath("pytorch_model.bin").touch()
    write(model="hub:org/model")
    assert planned().stages[0].fingerprint == before[0]
    write(model="hub:org/model", data="hub:datasets/org/chats/data")  # of which the cache may hold a part
    with pytest.raises(
        UserError, match=r"not fetched: hub:datasets/org/chats/data \(stages.data.source\); `cordee fetch"
    ):
        planned()


@pytest.mark.usefixtures("hub")
def test_a_recipe_without_references_is_one_line(fetch):
    write(model="r.yaml")
    done = fetch()
    assert (done.returncode, lines(done)[0].partition(";")[0]) == (2, "cordee: r.yaml: refers to nothing on the hub")


@pytest.mark.parametrize("name", ["../../../kept.json", "/kept.json", "a/../../kept.json"])
@pytest.mark.parametrize("to", [None, "models"])
def test_a_file_that_is_listed_outside_of_its_repository_is_not_fetched(hub, fetch, name, to):
    """As a server in the place of the hub might: the names of files are checked before any is asked for."""
    write(model="hub:org/model")
    hub.outside = {name: b"{}"}
    done = fetch(*(["--to", to] if to else []))
    assert done.returncode == 1
    assert f"the hub lists a file that is none: '{name}' leads out of its folder" in lines(done)[0]
    assert hub.asked == []
    assert not list(Path().parent.rglob("kept.json"))


def test_a_lock_from_someone_else_can_not_have_files_deleted(hub, fetch, tmp_path):
    """A newer commit removes the files of the one before: what a lock lists outside of it is not among them."""
    write(model="hub:org/model")
    assert fetch("--to", "models").returncode == 0
    kept = tmp_path / "kept.json"
    kept.write_text("{}")
    told = lock()
    (entry,) = told["references"].values()
    entry["files"]["../../../../../kept.json"] = {"bytes": 2, "sha256": hub_references.files.sha256(kept)}
    Path("r.lock.json").write_text(json.dumps(told))
    hub.write("models/org/model", {"config.json": "{}"})
    done = fetch("--update")
    assert (done.returncode, kept.read_text()) == (1, "{}")
    assert "leads out of its folder" in lines(done)[0]
