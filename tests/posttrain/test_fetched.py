"""A recipe that names a model and chats of the hub: fetched; then planned and run where there is no network."""

import json
import time
from pathlib import Path

import hub_server
import pytest
from chat_samples import some_chats


@pytest.mark.long
def test_what_is_fetched_is_all_that_a_run_needs(model_folder, tmp_path, cordee, no_network, monkeypatch):
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    stages = {
        "sft": {
            "uses": "posttrain.sft", "model": "hub:org/tiny", "data": [{"path": "hub:datasets/org/chats"}],
            "global_batch_size": 4, "lora": {"r": 2},
            "trainer": {"max_length": 128, "max_steps": 3, "learning_rate": 1e-3},
        },
        "merged": {"uses": "posttrain.merge", "adapter": "$sft"},
        "answers": {"uses": "eval.generate", "models": {"before": "hub:org/tiny", "after": "$merged"},
                    "prompts": "hub:datasets/org/chats", "engine": "transformers", "max_prompts": 2, "max_tokens": 4,
                    "max_length": 128, "dtype": "float32"},
        "report": {"uses": "eval.report", "artifacts": ["$sft", "$merged", "$answers"]},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "stages": stages}))
    with hub_server.serve(tmp_path / "served") as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        served.write("models/org/tiny", {path.name: path.read_bytes() for path in Path(model_folder).iterdir()})
        rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in some_chats(16))
        served.write("datasets/org/chats", {"README.md": "# Chats\n", "train.jsonl": rows})
        for command in (("plan", "r.yaml"), ("stage", "r.yaml", "sft")):
            began = time.monotonic()
            refused = cordee(*command, within=no_network)
            assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
            assert "not fetched: hub:org/tiny" in refused.stderr
            assert time.monotonic() - began < 30
        fetched = cordee("fetch", "r.yaml")
        assert fetched.returncode == 0, fetched.stderr
    for command in ("plan", "run"):
        done = cordee(command, "r.yaml", timeout=600, within=no_network)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/r/merged@1/model.safetensors").is_file()
    assert (tmp_path / "runs/r/report@1/index.html").is_file()
    manifest = json.loads((tmp_path / "runs/r/sft@1/manifest.json").read_text())
    commits = [served.commit(kind, name) for kind, name in (("models", "org/tiny"), ("datasets", "org/chats"))]
    assert [read["file"] for read in manifest["inputs"]] == [
        f"hub:org/tiny@{commits[0]}", f"hub:datasets/org/chats@{commits[1]}"
    ]  # fmt: skip
