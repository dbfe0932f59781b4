"""Names of files in records that others wrote lead nowhere but into the record's own folder."""

import json
from pathlib import Path

import manifests
import pytest

from cordee import files, hub, manifest, model_folder
from cordee.data import folder as data
from cordee.errors import Fault, UserError

OUTSIDE = ["../kept", "/etc/hostname", "a/../../kept", "..", "", "./../kept"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_is_refused(name):
    with pytest.raises(ValueError, match="leads out of its folder"):
        files.inside(name)


@pytest.mark.parametrize("name", ["a", "a/b.json", "..a/b..", ".hidden", "a/./b"])
def test_a_name_that_stays_is_itself(name):
    assert files.inside(name) == name


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest(name, tmp_path):
    (tmp_path / "sft@1").mkdir()
    item = manifest.File(path="a", bytes=1, sha256="0" * 64)
    manifest.write(
        tmp_path / "sft@1", manifests.draft().model_copy(update={"files": (item.model_copy(update={"path": name}),)})
    )
    with pytest.raises(Fault, match=r"can't be used: .*leads out of its folder"):
        manifest.read(tmp_path / "sft@1")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("place", ["files", "commit"])
def test_a_lock(name, place, tmp_path):
    entry = {"commit": "0" * 40, "files": {"a": {"bytes": 1, "sha256": "0" * 64}}}
    entry[place] = {name: {"bytes": 1, "sha256": "0" * 64}} if place == "files" else name
    (tmp_path / "r.lock.json").write_text(json.dumps({"folder": "x", "references": {"hub:a/b": entry}}))
    with pytest.raises(Fault, match=r"is no lock file: .*leads out of its folder"):
        hub.read(tmp_path / "r.yaml")


@pytest.mark.parametrize("text", ["hub:a/b@..", "hub:a/b@..%2F..%2Fx", "hub:a/b@main/../x", "hub:a/b@main/x/../../.."])
def test_a_reference(text):
    with pytest.raises(UserError, match="is no reference to the hub"):
        hub.parse(text, "r.yaml", "key")


@pytest.mark.parametrize("name", [*OUTSIDE, "weights.bin", "pytorch_model.pt", 3, None])
def test_an_index_of_weights(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"weight_map: (.* leads out of its folder|.* is no safetensors|is no index)"):
        model_folder.require(tmp_path)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_saved_data_set(name, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.arrow").touch()
    (tmp_path / "kept").touch()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match="leads out of its folder"):
        data.find_files(folder)


def test_patterns_of_a_data_sets_header(tmp_path):
    """What it names above its folder is not among its files."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (tmp_path / "kept.jsonl", folder / "own.jsonl"):
        path.write_text('{"text": "a"}\n')
    header = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: ['../*.jsonl', '*.jsonl']}"
    (folder / "README.md").write_text(f"---\n{header}\n---\n")
    assert data.find_files(folder, split="train").documents == [folder / "own.jsonl"]


def test_no_archive_is_unpacked_and_nothing_is_unpickled_by_our_own_code():
    """What `tarfile`, `zipfile` and `pickle` have brought to others can't happen where they are not imported."""
    root = Path(__file__).resolve().parents[2]
    sources = [path for name in ("cordee", "pretrain", "posttrain", "eval") for path in (root / name).rglob("*.py")]
    assert len(sources) > 200
    words = ("import tarfile", "import zipfile", "unpack_archive", "import pickle", "from pickle", "torch.load(")
    words += ("allow_pickle=True", "weights_only=False", "import dill", "cloudpickle", "joblib.load", "read_pickle")
    words += ("trust_remote_code=True", "shell=True", "yaml.Loader", "unsafe_load", "yaml.FullLoader")
    found = [(path.name, word) for path in sources for word in words if word in path.read_text(encoding="utf-8")]
    assert found == []


def test_nothing_of_ours_listens_but_the_server():
    """Processes beside a trainer are asked through a pipe; `cordee serve` has one address, and no key for it."""
    root = Path(__file__).resolve().parents[2]
    sources = [path for name in ("cordee", "pretrain", "posttrain", "eval") for path in (root / name).rglob("*.py")]
    words = ("0.0.0." + "0", "create_server", "HTTPServer", "import socketserver", "uvicorn.run", ".bind(", "Listener(")
    found = [(path.name, word) for path in sources for word in words if word in path.read_text(encoding="utf-8")]
    assert sorted(found) == [("server.py", ".bind("), ("slurm.py", ".bind(")], "the latter finds a port that is free"
    assert 'HOST = "127.0.0.1"' in (root / "cordee/compute/server.py").read_text(encoding="utf-8")
