"""The parity proof, as a process of its own: it holds for what is merged, and not for what is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cordee.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def forms(checkpoints, tmp_path_factory):
    """A model, an adapter on it, and both merged."""
    import torch
    from peft import LoraConfig, get_peft_model

    from cordee.compute.model import open_model, save_model

    folder = tmp_path_factory.mktemp("forms")
    torch.manual_seed(1)
    adapted = get_peft_model(
        open_model(checkpoints["first"]),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapted.save_pretrained(folder / "adapter")
    save_model(adapted.merge_and_unload(), folder / "merged", tokenizer=checkpoints["first"])
    return {"model": checkpoints["first"], "adapter": folder / "adapter", "artifact": folder / "merged"}


@pytest.fixture
def prompts(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": text}], "chosen": [{"role": "assistant", "content": answer}]}
        for text, answer in (("Alle Menschen sind frei.", "German"), ("Tous les hommes naissent libres.", "French"))
    ]
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prove(forms, tmp_path):
    config = tmp_path / "parity.yaml"
    config.write_text(json.dumps({name: str(path) for name, path in forms.items()}))
    command = [sys.executable, "-m", "eval.prove_parity", "--config", str(config), "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=False)
    return done, next((tmp_path / "runs").rglob("certificate.json"), None)


@pytest.mark.skipif("not __import__('importlib.util').util.find_spec('vllm')", reason="vLLM is not installed")
def test_every_form_of_a_merged_checkpoint_is_the_same_model(forms, tmp_path):
    """On texts of ours, and on the base that the adapter names."""
    done, certificate = prove({name: forms[name] for name in ("adapter", "artifact")}, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    proven = json.loads(certificate.read_text())
    values = [check["value"] for check in proven["checks"]]
    assert all(check["passed"] for check in proven["checks"])
    assert values[:2] == [0, 0]
    assert values[4] < 1e-4
    assert any("the adapter moves log-probabilities" in line for line in proven["evidence"])


@pytest.mark.skipif("not __import__('importlib.util').util.find_spec('vllm')", reason="vLLM is not installed")
def test_a_model_that_the_adapter_was_not_merged_into_is_a_fault(forms, prompts, tmp_path):
    done, certificate = prove({**forms, "artifact": forms["model"], "prompts": prompts}, tmp_path)
    assert done.returncode == 1
    assert "not proven: adapter and merged" in done.stderr
    assert certificate is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no rows"),
        ('{"text": "x"}\n', "row 1: is a text, and a chat is needed"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "prompts: holds no chats that end with an answer"),
    ],
)
def test_prompts_that_hold_no_chats_are_one_line(line, message, checkpoints, tmp_path):
    from eval.measuring import parity

    path = tmp_path / "chats.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=message):
        parity.read(path, 8, checkpoints["first"], 64)
