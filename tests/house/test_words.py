"""No site's path, no registry's address, no metaphor, and no module of a package with a dependency's name."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("capstor", "iopsstor", "weka", "nid0", "lustre", "gpfs")
METAPHORS = (
    *("[Rr]ooms?", "[Rr]opes?", "[Cc]limb(s|ed|ing)?", "[Dd]oors?"),
    *("[Mm]ountains?", "[Gg]laciers?", "[Mm]assif", "[Ss]ummits?"),
)
"""As regular expressions, which this file itself does not match; the abbreviation of rotary embeddings is none."""
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")[
    :-1
]
TEXTS = [name for name in TRACKED if not name.endswith((".parquet", ".png"))]
DEPENDENCIES = {
    "datasets",
    "tokenizers",
    "transformers",
    "accelerate",
    "trl",
    "peft",
    "torch",
    "vllm",
    "lm_eval",
    "evaluate",
}


@pytest.mark.parametrize("name", [name for name in TEXTS if not name.startswith("configs/clusters/")])
def test_no_file_names_a_site_or_a_registry(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for part in PARTS:
        assert f"/{part}" not in text
    assert "index-" + "url" not in text
    assert "registry" + ".npmjs" not in text
    assert "files.python" + "hosted" not in text


def metaphors(text):
    return [found[0] for found in re.finditer(rf"\b({'|'.join(METAPHORS)})\b", text)]


@pytest.mark.parametrize("name", [name for name in TEXTS if not name.startswith("data/")])
def test_no_file_uses_a_metaphor(name):
    """The field's terms instead: package, core, pipeline, entry point."""
    assert metaphors((ROOT / name).read_text(encoding="utf-8")) == []


def test_a_metaphor_is_seen():
    planted = "the whole " + "cli" + "mb; two " + "ro" + "oms; Ro" + "PE and rope_theta are no ro" + "pe"
    assert metaphors(planted) == ["cli" + "mb", "ro" + "oms", "ro" + "pe"]


def test_no_module_of_a_package_bears_a_dependencys_name():
    for package in ("pretrain", "posttrain", "eval"):
        assert not {path.stem for path in (ROOT / package).glob("*.py")} & DEPENDENCIES


def test_stages_are_started_by_module_and_packages_print_nothing():
    for package in ("pretrain", "posttrain", "eval"):
        for path in (ROOT / package).glob("*.py"):
            assert "print(" not in path.read_text(encoding="utf-8").replace("traceback.print", ""), path
