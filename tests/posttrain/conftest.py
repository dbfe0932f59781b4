"""A model, a tokenizer and a context for the tests of this package."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cordee.chat import base
from cordee.stage import Context

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "cordee" / "chat")]


@pytest.fixture(scope="session")
def template() -> str:
    """The project's chat template."""
    return base.TEMPLATE.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, template: str) -> Path:
    """An Apertus model with random weights, as a Hugging Face directory."""
    import torch
    from chat_samples import make_tokenizer
    from transformers import ApertusConfig, ApertusForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(folder, template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = ApertusConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = ApertusForCausalLM(config)
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|assistant_end|>"),
    ]
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A stage's context whose artifact's folder is open."""
    (tmp_path / "out").mkdir()
    (tmp_path / "run").mkdir()
    return Context(out=tmp_path / "out", seed=17, events=tmp_path / "run" / "events.jsonl")


@pytest.fixture
def new_context(tmp_path: Path) -> Callable[[str], Context]:
    """A context by name, in a folder as a recipe's run has it."""

    def make(name: str) -> Context:
        out, logs = tmp_path / f"{name}@1.partial", tmp_path / "logs" / name
        out.mkdir(exist_ok=True)
        logs.mkdir(parents=True, exist_ok=True)
        return Context(out=out, seed=3, events=logs / "events.jsonl")

    return make


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 preference pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from dpo_samples import pair

    rows = [pair(number) for number in range(24)]
    file = tmp_path_factory.mktemp("pairs") / "preferences.parquet"
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")}), file)
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of chats."""
    from architectures import chats

    return chats(tmp_path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A file of preference pairs."""
    from architectures import pairs_file

    return pairs_file(tmp_path)
