"""The made-up store that the report's tests read, a report of it, and small real checkpoints with held-out data."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

SHOWN = ("tokenizer", "base", "sft", "dpo", "merged", "benchmark", "samples")
PROOFS = ("prove-masks", "prove-resume")
Report = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> dict[str, Path]:
    """The folders of a whole recipe's artifacts, by stage."""
    import fake_store

    return fake_store.make(tmp_path / "runs")


@pytest.fixture
def report(store: dict[str, Path], tmp_path: Path) -> Report:
    """Writes a report of some stages and returns its folder."""
    from cordee.stage import Context
    from eval.report import Config, run

    def call(shown: tuple[str, ...] = SHOWN, proofs: tuple[str, ...] = PROOFS, title: str = "") -> Path:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        config = Config.model_validate(
            {
                "title": title,
                "artifacts": [str(store[name]) for name in shown],
                "certificates": [str(store[name]) for name in proofs],
            }
        )
        run(config, Context(out=out, seed=0, events=tmp_path / "events.jsonl"))
        return out

    return call


PROMPTS = [
    {"prompt": f"Which language is this?\n\n{text}", "answer": answer, "choices": ["German", "French"],
     "kind": "language", "language": tag}
    for text, answer, tag in [
        ("Alle Menschen sind frei und gleich geboren.", "German", "de"),
        ("Tous les hommes naissent libres et égaux.", "French", "fr"),
        ("Jeder hat das Recht auf Leben.", "German", "de"),
        ("Tout individu a droit à la vie.", "French", "fr"),
    ]
]  # fmt: skip


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints of one shape with different random weights, as the training stages write them."""
    import torch
    from chat_models import make_model

    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    return {name: make_model(root / name) for name in ("first", "second")}


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Held-out prompts and documents."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("heldout")
    (root / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), encoding="utf-8")
    rows = [{"text": row["prompt"].partition("\n\n")[2], "language": row["language"]} for row in PROMPTS]
    pq.write_table(pa.Table.from_pylist(rows), root / "heldout.parquet")
    return {"language": root / "heldout.jsonl", "documents": root / "heldout.parquet"}


ROLLING = """
task: rolling
dataset_path: parquet
dataset_kwargs: {data_files: {test: documents}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
metadata: {version: 1.0, chat: false, chance: null, description: bits per byte in lm-eval's own windows}
"""


@pytest.fixture(scope="session")
def rolling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that lm-eval scores in windows of its own."""
    path = tmp_path_factory.mktemp("rolling") / "rolling.yaml"
    path.write_text(ROLLING)
    return path


@pytest.fixture(scope="session")
def adapters(checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters on the first checkpoint: two that move it, of different ranks, and one without effect."""
    import os

    from chat_models import make_adapter

    root = tmp_path_factory.mktemp("adapters")
    made = {
        "small": make_adapter(root / "small", checkpoints["first"], seed=1, r=4),
        "large": make_adapter(root / "large", checkpoints["first"], seed=2, r=16, use_rslora=True),
        "idle": make_adapter(root / "idle", checkpoints["first"], seed=3, init_lora_weights=True),
    }
    config = made["small"] / "adapter_config.json"  # as posttrain writes it
    told = json.loads(config.read_text(encoding="utf-8"))
    told["base_model_name_or_path"] = os.path.relpath(checkpoints["first"], made["small"])
    config.write_text(json.dumps(told), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def models(checkpoints, adapters):
    """lm-eval around one vLLM for the checkpoints and the adapters."""
    from cordee.compute.engine import Settings
    from eval.measuring import backends

    served = [*checkpoints.values(), *adapters.values()]
    opened = backends.Models(Settings("vllm", 256, "float32", enforce_eager=True), served)
    yield opened
    opened.close()  # before another test, as training does, ends the process group
