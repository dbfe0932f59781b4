"""The recipe for a model and chats of one's own, on a tiny model like SmolLM2: TRL, PEFT, vLLM, lm-eval, report."""

import json
import shutil
from pathlib import Path

import pytest
import stock_tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "configs/recipes/tiny/smollm2.yaml"
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '" + SYSTEM.replace("\n", "\\n") + "' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WIDTH = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def here(tmp_path):
    """A folder with the repository's files, as a clone has them."""
    for name in ("configs", "data", "eval", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def make_model(folder):
    made, settings, _ = stock_tokenizers.smollm2()
    stock_tokenizers.write(folder, (made, settings | {"chat_template": TEMPLATE}, ""), beside_model=False)
    ids = {f"{name}_token_id": made.token_to_id(settings[f"{name}_token"]) for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=made.get_vocab_size(), max_position_embeddings=4096, num_key_value_heads=1, tie_word_embeddings=True,
        initializer_range=0.2, **WIDTH, **ids,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize("recipe", [RECIPE, "configs/recipes/smollm2.yaml"])
@pytest.mark.usefixtures("here")
def test_without_the_model_one_line_says_what_makes_it(cordee, recipe):
    planned = cordee("plan", recipe)
    assert planned.returncode == 2
    assert planned.stderr.strip().endswith("no file or folder 'models/smollm2'; `make models/smollm2` makes it")
    assert len(planned.stderr.strip().splitlines()) == 1


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_before_and_after_lora_and_full_fine_tuning_are_side_by_side(here, cordee):
    make_model(here / "models/smollm2")
    done = cordee("run", RECIPE, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = here / "runs/smollm2-tiny"
    assert f"report: {runs.relative_to(here)}/report@1/index.html" in done.stdout

    assert "gsm8k_bits_per_byte, bits_per_byte: before " in done.stdout
    assert done.stdout.strip().endswith("chat: cordee chat smollm2-tiny/full@1")

    table = json.loads((runs / "benchmark@1/results.json").read_text())
    assert [row["name"] for row in table["models"]] == ["before", "lora", "full"]
    assert (table["engine"]["name"], table["engine"]["dtype"]) == ("vllm", "float32")
    found = [{(one["task"], one["filter"]): one["value"] for one in row["results"]} for row in table["models"]]
    bits = [values["gsm8k_bits_per_byte", "none"] for values in found]
    assert bits[1] < bits[0] > bits[2], "two steps at a high learning rate"
    assert all(0 <= values["gsm8k", chosen] <= 1 for values in found for chosen in ("strict-match", "flexible-extract"))

    answers = [json.loads(line) for line in (runs / "answers@1/samples.jsonl").read_text().splitlines()]
    assert [list(row["outputs"]) for row in answers] == [["before", "lora", "full"]] * 2
    assert answers[0]["prompt"].startswith("Janet")
    shutil.rmtree(here / "models")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_dpo_and_grpo_on_its_own_answers(here, cordee):
    make_model(here / "models/smollm2")
    done = cordee("run", "configs/recipes/tiny/smollm2-align.yaml", timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = here / "runs/smollm2-align-tiny"
    table = json.loads((runs / "benchmark@1/results.json").read_text())
    assert [row["name"] for row in table["models"]] == ["before", "sft", "dpo", "grpo"]
    scored = json.loads((runs / "scored@1/manifest.json").read_text())["metrics"]
    assert 0 < scored["short_mean"] < 1, scored
