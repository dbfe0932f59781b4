"""References to the hub: how they are written, which files they mean, and where their files lie."""

from pathlib import Path

import pytest

from cordee import hub
from cordee.errors import Fault, UserError


def parse(text):
    return hub.parse(text, "r.yaml", "stages.sft.model")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("hub:org/model", ("model", "org/model", "main", "")),
        ("hub:gpt2", ("model", "gpt2", "main", "")),
        ("hub:org/model-1.5@v2/sub/a.jinja", ("model", "org/model-1.5", "v2", "sub/a.jinja")),
        ("hub:datasets/org/chats", ("dataset", "org/chats", "main", "")),
        ("hub:datasets/org/chats@refs%2Fpr%2F1/train", ("dataset", "org/chats", "refs/pr/1", "train")),
        ("hub:datasets/xnli", ("dataset", "xnli", "main", "")),
    ],
)
def test_a_reference_is_read(text, meant):
    found = parse(text)
    assert (found.kind, found.name, found.revision, found.place) == meant


@pytest.mark.parametrize(
    "text", ["hub:", "hub:org/", "hub:/org/model", "hub:org/model@", "hub:org/model/../x", "hub:../x"]
)
def test_what_is_no_reference_is_one_line(text):
    with pytest.raises(UserError, match=r"r\.yaml: stages\.sft\.model: '.*' is no reference to the hub; write hub:"):
        parse(text)


def test_the_record_has_the_commit():
    assert parse("hub:org/model@v2/a.json").at("abc") == "hub:org/model@abc/a.json"
    assert parse("hub:datasets/org/chats").at("abc") == "hub:datasets/org/chats@abc"


MODEL = (
    *("config.json", "tokenizer.json", "README.md", "LICENSE", "model.safetensors", "consolidated.safetensors"),
    *("pytorch_model.bin", "model.onnx", "additional_chat_templates/tool_use.jinja", "original/params.json"),
    *(".gitattributes", "modeling_own.py", "half/config.json", "half/model.safetensors"),
)
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
DATA = ("README.md", "main/train.parquet", "main/test.parquet", "load.py", ".gitattributes", "old/rows.pkl", "x.csv.gz")


@pytest.mark.parametrize(
    ("text", "names", "taken"),
    [
        ("hub:a/b", MODEL, {MODEL[place] for place in (0, 1, 2, 3, 4, 8)}),
        ("hub:a/b/half", MODEL, {"half/config.json", "half/model.safetensors"}),
        ("hub:a/b/tokenizer.json", MODEL, {"tokenizer.json"}),
        ("hub:a/b/pytorch_model.bin", MODEL, set()),
        ("hub:a/b", ADAPTER, ADAPTER),
        ("hub:datasets/a/b", DATA, {"README.md", "main/train.parquet", "main/test.parquet", "x.csv.gz"}),
        ("hub:datasets/a/b/main", DATA, {"main/train.parquet", "main/test.parquet"}),
        ("hub:datasets/a/b/x.csv.gz", DATA, {"x.csv.gz"}),
        ("hub:datasets/a/b/mai", DATA, set()),
    ],
)  # fmt: skip
def test_what_is_fetched_of_a_repository(text, names, taken):
    assert set(parse(text).takes(names)) == taken


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"HF_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "/h"}, "/h/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HOME": "/me"}, "/me/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(environment, place, monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = parse("hub:datasets/org/chats").folder("abc", None)
    assert found == Path(place) / "datasets--org--chats" / "snapshots" / "abc"
    assert parse("hub:org/model").folder("abc", "/data") == Path("/data/models/org/model")


def test_a_lock_that_is_none_is_one_line(tmp_path):
    assert hub.read(tmp_path / "r.yaml") == hub.Lock()
    (tmp_path / "r.lock.json").write_text('{"references": {"hub:a/b": {"commit": 3}}}')
    with pytest.raises(Fault, match=r"r\.lock\.json: is no lock file: .*; delete it, and fetch again") as caught:
        hub.read(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)
