"""A tiny model, data of every shape that the configurations name, and the way from a configuration to a plan."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cordee import plan, recipe, yaml12
from cordee.artifact import Store

sys.path.insert(0, str(Path(__file__).parent))
ASKED, SAID = "What is rain?", "Water that falls from clouds."
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
ROWS = {
    "chats": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
    "alpaca": {"instruction": ASKED, "input": "", "output": SAID},
    "questions": {"question": ASKED, "answer": SAID},
    "texts": {"text": SAID},
    "bodies": {"body": SAID},
    "pairs": {"prompt": ASKED, "chosen": SAID, "rejected": "I do not know."},
    "conversation_pairs": {"conversation": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1] | {"content": "No."}},
    "answer_pairs": {"question": ASKED, "response_j": SAID, "response_k": "No."},
}
HUB = {
    "owner/texts": "texts",
    "tatsu-lab/alpaca": "alpaca",
    "yahma/alpaca-cleaned": "alpaca",
    "lvwerra/stack-exchange-paired": "answer_pairs",
}
"""Data sets of the hub that are named otherwise than by their shape."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model and data, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    shape = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(shape))
    save_file({"model.embed_tokens.weight": np.zeros((64, 8), np.float32)}, tmp_path / "model/model.safetensors")
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    return tmp_path


@pytest.fixture
def planned(place):
    """The plan of a recipe file, with models and data of the hub replaced by those in the folder."""

    def local(value):
        if isinstance(value, dict):
            found = {name: local(inner) for name, inner in value.items()}
            if str(value.get("path", "")).startswith("hub:"):
                found = {name: inner for name, inner in found.items() if name not in ("split", "subset", "files")}
            return found
        if isinstance(value, list):
            return [local(inner) for inner in value]
        if not isinstance(value, str) or not value.startswith("hub:"):
            return value
        name = value.removeprefix("hub:").removeprefix("datasets/").partition("@")[0]
        return "model" if name == "owner/model" else f"{HUB.get(name, name.rpartition('/')[2])}.jsonl"

    def call(file):
        return plan.make(recipe.check(local(yaml12.read(file)), file), Store(place / "runs"))

    return call
