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
