"""Checkpoints of the known architectures in the real vLLM: each gives the log-probabilities of transformers.

The table in docs/architectures.md is the last result of `make test-long`.
"""

import datetime as dt
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "architectures.md"
HEAD = """# Which models vLLM serves

Two checkpoints of each architecture and a LoRA adapter on all linear layers, tiny and with random weights, in the
stages' own engine: `make test-long` starts vLLM on the first checkpoint, compares its log-probabilities on the probe
with those of transformers, gives it the weights of the second and compares again; then the adapter without merging it,
with those of PEFT. The columns have the largest difference in nats.

Experts are packed when vLLM loads them on a CPU, and a reload leaves them as they are: there vLLM is started again for
each checkpoint. The sliding window of Cohere 2 has a token more in vLLM than in transformers: longer texts differ. What
vLLM refuses, in its own words below, runs with `engine: transformers`; an adapter can also be merged first.

Of {date}, with vLLM {version} in float32, without compiling:

| architecture | embedding and head | checkpoints | other weights by | adapter |
|---|---|---|---|---|
"""
Case = tuple[str, bool]


def in_a_process(cases: list[Case], folder: Path) -> list[Any]:
    """What `served` tells, from a process of its own: this one may have an engine that other tests use."""
    import served_models

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(served_models.served, cases, folder).result()


@pytest.mark.long
def test_tied_tables_without_a_head_and_experts_are_served(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed on this platform")
    cases = [("GPT-2", True), ("OLMo 2", False), ("Mixtral", False)]
    for (name, _), (first, second, adapter), way in in_a_process(cases, tmp_path):
        assert max(first, second) < 1e-4, name
        assert adapter < 1e-4 if name == "OLMo 2" else adapter.startswith("vLLM does not serve it: ")
        assert way == ("start" if name == "Mixtral" else "reload")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_architecture_is_served(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed on this platform")
    from served_models import CASES

    from cordee.compute.engine import Settings

    rows, wrong = [], []
    for (name, tied), (first, second, adapter), way in in_a_process(CASES, tmp_path):
        found = max(first, second) if isinstance(first, float) and isinstance(second, float) else first
        cells = [f"{value:.1e}" if isinstance(value, float) else value for value in (found, adapter)]
        rows.append(f"| {name} | {'tied' if tied else 'apart'} | {cells[0]} | {way} | {cells[1]} |")
        wrong += [name for cell in cells if "vLLM's log-probabilities" in cell]
    version, date = Settings("vllm").describe()["version"], dt.datetime.now(dt.UTC).date()
    TABLE.write_text(HEAD.format(date=date, version=version) + "\n".join(rows) + "\n", encoding="utf-8")
    assert not wrong
