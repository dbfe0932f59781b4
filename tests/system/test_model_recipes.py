"""The recipes for a model of one's own: each plans for a model of its size, and its small version runs."""

import io
import json
from pathlib import Path
from typing import Any

import large_models
import pytest
import torch
from rich.console import Console
from transformers import ApertusConfig, ApertusForCausalLM

from cordee import plan, recipe, show
from cordee.artifact import Store

ROOT = Path(__file__).resolve().parents[2]
CHATS, LENGTH = 4000, 1500
"""Chats of the test's data, and letters in each."""


PROMPTS = 1000
TOKENS = {"sft": CHATS * LENGTH / 3, "dpo": 2 * 10 * PROMPTS * 4096, "qrpo": 10 * PROMPTS * 4096}
"""Of a training: what its chats have; of a preference method at most, a pair of each of 10 answers to a prompt."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the repository's files, as a clone has them, and data of one's own."""
    for name in ("configs", "eval", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/openai").symlink_to(ROOT / "data/openai")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chats(file: Path, count: int, letters: int) -> None:
    """Write chats of one question and one answer."""
    text = ("the question is what a chat is made of, and how long it may be " * 100)[: letters // 2]
    rows = [
        [{"role": "user", "content": f"{at} {text}"}, {"role": "assistant", "content": text}] for at in range(count)
    ]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


def alignment(here: Path) -> None:
    """Write prompts, and a reward model of one layer."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    for name, count in (("my-prompts", PROMPTS), ("my-heldout-prompts", 300)):
        rows = (json.dumps({"prompt": f"What is {at} times 7?"}) + "\n" for at in range(count))
        (here / f"data/{name}.jsonl").write_text("".join(rows))
    folder = here / "models/my-reward-model"
    large_models.write(folder, "8b")
    (folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
        vocab_size=500, max_position_embeddings=2048, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)


def planned(name: str, *overrides: str) -> tuple[plan.Plan, str]:
    """The plan of a recipe, and what `cordee plan` prints of it on a wide terminal."""
    made = plan.make(recipe.load(Path(f"configs/recipes/models/{name}.yaml"), overrides), Store(Path("runs")))
    out = io.StringIO()
    show.plan(Console(file=out, width=150), made)
    return made, out.getvalue()


def hours(made: plan.Plan, stage: str) -> float:
    """The time that the plan gives a training, as it rests on its FLOPs and devices."""
    one = made.stage(stage)
    return one.cost.flops / show.ROUGH_GPU_FLOPS_PER_S / one.config.launch.num_processes / 3600


@pytest.mark.parametrize(
    ("name", "size", "overrides", "memory", "device"),
    [
        ("lora-8b", "8b", [], (17e9, 22e9), 24e9),
        (
            "lora-8b",
            "8b",
            ["sft.quantization={load_in_4bit: true, bnb_4bit_use_double_quant: true}"],
            (6e9, 12e9),
            16e9,
        ),
        ("sft-8b", "8b", [], (38e9, 56e9), 80e9),
        ("sft-70b", "70b", [], (25e9, 50e9), 80e9),
        ("dpo-apertus", "8b", [], (38e9, 56e9), 80e9),
        ("qrpo-apertus", "8b", [], (38e9, 56e9), 80e9),
    ],
)
def test_a_recipe_plans_for_a_model_of_its_size(
    here: Path, name: str, size: str, overrides: list[str], memory: tuple[float, float], device: float
) -> None:
    large_models.write(here / "models/my-model", size)
    chats(here / "data/my-chats.jsonl", CHATS, LENGTH)
    alignment(here)
    made, told = planned(name, *overrides)
    trained = name.partition("-")[0].replace("lora", "sft")
    cost = made.stage(trained).cost
    assert cost.parameters == pytest.approx(large_models.PARAMETERS[size], rel=1e-3)
    assert memory[0] < cost.memory_bytes < memory[1] < device
    assert cost.tokens == pytest.approx(TOKENS[trained], rel=0.3)
    assert f"{trained}: {str(cost.memory).replace(' = ', ' a device = ')}" in told
    assert "≈ at 3e14 FLOP/s a GPU, 30 % of an H100's peak" in told
    assert all(one.state == "ready" for one in made.stages)


@pytest.mark.parametrize(("name", "size", "published"), [("sft-8b", "8b", 6960.0), ("sft-70b", "70b", 723.0)])
def test_the_time_is_within_a_factor_of_two_of_what_apertus_was_trained_in(
    here: Path, name: str, size: str, published: float
) -> None:
    """Tokens a second and GPU in bfloat16, of 4096 tokens a row (technical report, arXiv 2509.14233, section 6)."""
    large_models.write(here / "models/my-model", size)
    chats(here / "data/my-chats.jsonl", CHATS, LENGTH)
    made, _ = planned(name)
    one = made.stage("sft")
    rate = one.cost.tokens / (hours(made, "sft") * 3600) / one.config.launch.num_processes
    assert 1 / 2 < rate / published < 2


def test_what_the_memory_is_for_follows_from_the_recipe(here: Path) -> None:
    large_models.write(here / "models/my-model", "8b")
    chats(here / "data/my-chats.jsonl", 40, LENGTH)

    def terms(name: str, *overrides: str) -> Any:
        return planned(name, *overrides)[0].stage("sft").cost.memory

    lora, full = terms("lora-8b"), terms("sft-8b")
    trained = 16 * 32 * (2 * (4096 + 4096) + 2 * (1024 + 4096) + 2 * (4096 + 21504))
    assert lora.gradients == 4 * trained
    assert lora.weights == pytest.approx(2 * large_models.PARAMETERS["8b"] + 4 * trained, rel=1e-3)
    assert full.weights == full.gradients == full.optimizer / 2 == pytest.approx(8.05e9, rel=0.01)
    assert full.gathered == pytest.approx(2 * (3 * 218e6 + 131072 * 4096), rel=0.01)
    more = terms("sft-8b", "sft.launch.num_processes=8")
    assert more.weights == pytest.approx(full.weights / 2)
    no = "sft.trainer.gradient_checkpointing=false"
    assert terms("lora-8b", no).activations > 10 * lora.activations
    assert terms("lora-8b", "sft.trainer.optim=paged_adamw_8bit").optimizer == lora.optimizer / 4
    assert terms("lora-8b", "sft.lora.target_modules=[q_proj, v_proj]").gradients < lora.gradients / 4
    assert terms("lora-8b", "sft.trainer.max_length=2048").activations == lora.activations / 2
    four = terms("lora-8b", "sft.quantization={load_in_4bit: true}")
    matrices = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 2 * 4096 * 21504)
    assert lora.weights - four.weights == pytest.approx((2 - 0.5625) * matrices + 2 * trained)
    assert str(planned("sft-8b")[1]).count(" a device = ") == 1


def small_model(folder: Path) -> None:
    """An Apertus model of two layers."""
    large_models.write(folder, "8b")
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    from tokenizers import Tokenizer

    opened = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {f"{name}_token_id": opened.token_to_id(told[f"{name}_token"]) for name in ("bos", "eos", "pad")}
    config = ApertusConfig(
        vocab_size=opened.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, **ids,
    )  # fmt: skip
    ApertusForCausalLM(config).save_pretrained(folder)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["lora-8b", "sft-8b", "sft-70b", "dpo-apertus", "qrpo-apertus"])
def test_a_small_version_runs(here: Path, cordee: Any, name: str) -> None:
    small_model(here / "models/my-model")
    chats(here / "data/my-chats.jsonl", 24, 120)
    alignment(here)
    (here / "data/my-prompts.jsonl").write_text("".join(f'{{"prompt": "What is {at} times 7?"}}\n' for at in range(10)))
    done = cordee("run", f"configs/recipes/tiny/models/{name}.yaml", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = here / f"runs/{name}-tiny"
    assert (runs / "report@1/index.html").is_file()
    trained = name.partition("-")[0].replace("lora", "sft")
    metrics = json.loads((runs / f"{trained}@1/manifest.json").read_text())["metrics"]
    assert metrics["num_processes"] == (1 if name == "lora-8b" else 2)
    assert metrics["loss"] > 0
    table = json.loads((runs / "benchmark@1/results.json").read_text())
    assert [row["name"] for row in table["models"]] == ["before", "after"]
