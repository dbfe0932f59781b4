"""A damaged artifact is noticed and named, counts as not made, and ends no command over the others."""

import json
import os
import shutil

import damages
import manifests
import pytest
from damages import printed
from rich.console import Console

from cordee import lineage, manifest, plan, recipe, runner, show
from cordee.artifact import Damaged, Store
from cordee.errors import Fault

BROOK = """
name: brook
stages:
  spring: {uses: toys.spring}
  pool:   {uses: toys.spring, source: $spring/line.txt}
  lake:   {uses: toys.spring, source: $pool, text: deep}
"""
SEED = 20261125


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of two recipes' artifacts, with files of text and bytes, nested and empty."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "brook.yaml").write_text(BROOK)
    store = Store(folder / "runs")
    runner.run(plan.make(recipe.load(folder / "brook.yaml"), store), Console(quiet=True))
    for name, content in (("weights.bin", bytes(range(256)) * 4), ("empty", b""), ("deep/er/ids.bin", b"\0" * 50)):
        path = store.root / "brook/spring@1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifests.change(store.root / "brook/spring@1", files=manifests.listed(store.root / "brook/spring@1"))
    shutil.copytree(store.root / "brook/lake@1", store.root / "other/lake@1")
    manifests.change(store.root / "other/lake@1", recipe="other", fingerprint="f")
    return folder


@pytest.fixture
def brook(made, tmp_path, monkeypatch):
    """A copy of the store, as the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder, *overrides):
    return plan.make(recipe.load(folder / "brook.yaml", overrides), Store(folder / "runs"))


def test_of_200_damages_planted_at_random_all_are_noticed_and_none_ends_a_command(brook):
    store = Store(brook / "runs")
    assert printed(show.verify, store.scan())[0]
    kinds = set()
    for what, problem in damages.check(store, lambda: load(brook), 200, SEED):
        assert not problem, what
        kinds.add((what.partition(":")[0], manifest.NAME in what))
    assert len(kinds) == 8, "each kind was planted in a manifest and in another file"
    assert printed(show.verify, store.scan())[0]


def resealed(**fields):
    return lambda folder: manifests.change(folder, **fields)


def rewritten(change):
    """Change the JSON of a manifest and keep its old digest, as an editor does."""

    def call(folder):
        told = json.loads((folder / manifest.NAME).read_text())
        change(told)
        (folder / manifest.NAME).write_text(json.dumps(told, indent=2))

    return call


def misshapen(text):
    from cordee import files

    return lambda folder: files.write_sealed(folder / manifest.NAME, text)


DAMAGES = {
    "gone": (lambda folder: (folder / manifest.NAME).unlink(), "manifest.json is missing"),
    "empty": (lambda folder: (folder / manifest.NAME).write_text(""), "manifest.json is damaged"),
    "no JSON": (lambda folder: (folder / manifest.NAME).write_text("{"), "manifest.json is damaged"),
    "bytes": (lambda folder: (folder / manifest.NAME).write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
    "edited": (rewritten(lambda told: told.update(stage="pond")), "manifest.json is damaged"),
    "reformatted": (rewritten(dict.copy), "manifest.json is damaged"),
    "of another schema": (misshapen({"schema": 3}), "manifest.json has schema 3, and this version reads 2"),
    "keys": (misshapen({"schema": 2, "recipe": "brook"}), "manifest.json: stage: can't be used: Field required"),
    "list": (misshapen({"schema": [2]}), "manifest.json has schema [2]"),
    "renamed": (resealed(stage="pond"), "is brook/pond@1 by its manifest: was the folder renamed?"),
    "of another recipe": (resealed(recipe="stream"), "is stream/spring@1 by its manifest"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "manifest.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_manifest_is_named_counts_as_not_made_and_is_made_anew_beside(brook, kind):
    damage, message = DAMAGES[kind]
    damage(brook / "runs/brook/spring@1")
    assert (brook / "runs/brook/spring@1").exists()
    now = load(brook)
    assert [(planned.state, planned.name) for planned in now.stages] == [
        ("ready", "spring"), ("done", "pool"), ("done", "lake"),
    ]  # fmt: skip
    for screen in (show.plan, show.status):
        assert f"brook/spring@1 counts as not made: {message}" in " ".join(printed(screen, now)[1].split())
    is_whole, said = printed(show.verify, now.store.scan())
    assert (is_whole, said.count("whole")) == (False, 3)
    assert "damaged  brook/spring@1" in said
    tree = printed(lambda out: out.print(show.lineage_tree(lineage.walk(now.stage("lake").artifact, now.store))))[1]
    assert "brook/pool@1" in tree
    assert message in tree
    artifacts, shown = printed(lambda out: runner.run(now, out))
    assert artifacts["spring"].name == "brook/spring@2"
    assert "starts as brook/spring@2, beside brook/spring@1, which can't be used" in shown
    assert [planned.state for planned in load(brook).stages] == ["done"] * 3


def test_the_commands_name_a_damaged_artifact_in_one_line(brook, cordee):
    (brook / "runs/other/lake@1/manifest.json").write_text("{")
    (brook / "runs/brook/pool@1/line.txt").unlink()
    for command in (("plan", "brook.yaml"), ("status", "brook.yaml"), ("run", "brook.yaml")):
        done = cordee(*command)
        assert (done.returncode, done.stderr) == (0, "")
        assert "other/lake@1 counts as not made: manifest.json is damaged" in done.stdout
    verified = cordee("verify")
    assert (verified.returncode, verified.stderr) == (1, "")
    assert [line.split()[0] for line in verified.stdout.splitlines()] == [
        "whole", "damaged", "runs/brook/pool@1/line.txt:", "whole", "damaged", "manifest.json",
    ]  # fmt: skip
    for command in (("lineage", "other/lake@1"), ("run", "brook.yaml", "lake.source=other/lake@1/line.txt")):
        failed = cordee(*command)
        assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
        assert "other/lake@1: manifest.json is damaged: its content differs" in failed.stderr


def test_a_cost_that_cant_be_read_from_a_damaged_artifact_is_unknown(brook, write):
    tokens = write("runs/brook/tokens@1/tokens.json", '{"vocab_size": 100}').parent
    manifests.seal(tokens, stage="tokens")
    write("m.yaml", "{hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1, "
          "num_key_value_heads: 1}")  # fmt: skip
    write("brook.yaml", BROOK + """
  base: {uses: pretrain.train, model: m.yaml, data: [{tokens: brook/tokens@1}], max_steps: 2, global_batch_size: 8,
         sequence_length: 8, learning_rate: 0.1}
""")  # fmt: skip
    assert load(brook).stage("base").cost.vocab_size == 100
    for text in ("{", '{"vocab_syze": 100}', "[]"):
        (tokens / "tokens.json").write_text(text)
        (why,) = load(brook).stage("base").why
        assert why.startswith("data.0.tokens: ")
        assert "tokens.json: has" in why or "tokens.json: its content differs" in why
    (tokens / "tokens.json").unlink()
    assert load(brook).stage("base").state == "ready"


def test_a_path_into_a_damaged_artifact_is_one_line(brook):
    (brook / "runs/other/lake@1/manifest.json").unlink()
    with pytest.raises(Fault, match=r"stages.lake.source: other/lake@1: manifest.json is missing; run its recipe"):
        load(brook, "lake.source=runs/other/lake@1/line.txt")
    found = lineage.find("runs/other/lake@1/line.txt", Store(brook / "runs"))
    assert isinstance(found, Damaged)


def test_a_damaged_cache_of_hashes_is_not_believed(brook):
    (brook / "rock.txt").write_text("rock")
    os.utime(brook / "rock.txt", (0, 0))
    before = load(brook, "spring.source=rock.txt").stage("spring").fingerprint
    path = brook / "runs/.hashes.json"
    content = path.read_text()
    assert "rock.txt" in content
    path.write_text(content.replace("[", "[ "))
    assert load(brook, "spring.source=rock.txt").stage("spring").fingerprint == before
    for text in ("", "[]", "{"):
        path.write_text(text)
        assert load(brook, "spring.source=rock.txt").stage("spring").fingerprint == before


def test_events_that_were_cut_or_flipped_end_no_command(brook, cordee):
    assert cordee("run", "brook.yaml", "spring.text=wine", "spring.trouble=kill").returncode == 1
    path = brook / "runs/brook/logs/spring@2/events.jsonl"
    whole = path.read_bytes()
    for content in (b"", b"\xff" + whole, b"[]\n", b'{"event": "start"}\n', whole[:-3], b'{"time": 3}\n' + whole):
        path.write_bytes(content)
        told = cordee("status", "brook.yaml", "spring.text=wine")
        assert (told.returncode, told.stderr) == (0, "")
