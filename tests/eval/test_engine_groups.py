"""Which vLLM serves which models: one for all of a shape, and one after the other."""

import json
import shutil
from pathlib import Path

import pytest
from figures import figure

from cordee.errors import UserError

pytest.importorskip("vllm", reason="vLLM is not installed on this platform")
HELDOUT = str(Path(__file__).resolve().parents[2] / "eval" / "tasks" / "heldout_bits_per_byte.yaml")
EAGER = {"max_length": 256, "dtype": "float32", "enforce_eager": True}


def test_two_shapes_have_an_engine_each(checkpoints, tmp_path):
    from chat_models import make_model

    from cordee.compute import serving
    from cordee.compute.engine import Settings

    wide = make_model(tmp_path / "wide", 128)
    given = [checkpoints["first"], wide, checkpoints["second"]]
    assert serving.groups(given, Settings("vllm", **EAGER)) == [given[::2], [wide]]


def test_a_bfloat16_base_and_its_sft_of_another_dtype_template_and_tokenizer_file_are_one_shape(checkpoints, tmp_path):
    """What encodes and stops the same, or is each model's own, is no other shape."""
    from cordee.compute import serving
    from cordee.compute.engine import Settings

    other = shutil.copytree(checkpoints["second"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "eos_token_id": 5}))
    (other / "chat_template.jinja").write_text("{{ bos_token }}")
    (other / "tokenizer.json").write_text(json.dumps(json.loads((other / "tokenizer.json").read_text())))
    both = [checkpoints["first"], other]
    assert serving.groups(both, Settings("vllm", **EAGER)) == [both]
    assert serving.groups(both, Settings("vllm")) == [both]  # both in bfloat16
    (other / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert serving.groups(both, Settings("vllm")) == [[checkpoints["first"]], [other]]
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokenizer["model"]["vocab"]["zz"] = tokenizer["model"]["vocab"].pop(last)
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert serving.groups(both, Settings("vllm", **EAGER)) == [[checkpoints["first"]], [other]]


def test_what_is_no_model_is_named_before_anything_starts(checkpoints, tmp_path):
    from cordee.compute import serving
    from cordee.compute.engine import Settings

    with pytest.raises(UserError, match=r"models\.dpo: is no Hugging Face model"):
        serving.require_served({"first": checkpoints["first"], "dpo": tmp_path}, Settings("vllm"))


def test_more_tokens_than_the_model_has_positions_are_refused(checkpoints):
    from cordee.compute import engine

    assert engine.longest_request(checkpoints["first"], None) == 512
    assert engine.longest_request(checkpoints["first"], 128) == 128
    with pytest.raises(UserError, match=r"max_length: 1024 tokens were asked for, and .* has 512 positions"):
        engine.longest_request(checkpoints["first"], 1024)


SIZES = {"one": 64, "wide": 128, "two": 64}


def test_models_of_two_shapes_are_measured_and_tied_embeddings_are_replaced_in_the_head_too(held_out, tmp_path):
    """By the stage's own entry point: vLLM measures of each model what transformers measures."""
    import subprocess
    import sys

    import torch
    from chat_models import make_model

    torch.manual_seed(5)
    models = {name: str(make_model(tmp_path / name, size, tied=True)) for name, size in SIZES.items()}
    bits = {}
    for name in ("vllm", "transformers"):
        config = {
            "models": models,
            "tasks": [HELDOUT],
            "data": {"documents": str(held_out["documents"])},
            "engine": name,
            "enforce_eager": True,
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
        command = ["-m", "eval.benchmark", "--config", str(tmp_path / f"{name}.yaml"), "--runs", str(tmp_path / name)]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        (file,) = (tmp_path / name).rglob("results.json")
        rows = json.loads(file.read_text())["models"]
        assert [row["name"] for row in rows] == list(models)
        bits[name] = [figure(row, "heldout_bits_per_byte")["value"] for row in rows]
    assert bits["vllm"] == pytest.approx(bits["transformers"], rel=1e-3)
    assert abs(bits["vllm"][0] - bits["vllm"][2]) > 0.01 * bits["vllm"][0]
