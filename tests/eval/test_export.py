"""`cordee export`: what it writes is the model, and its card says what the manifests say."""

import os
import re
import shutil
from pathlib import Path

import manifests
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from cordee import files, units
from cordee.artifact import Store
from cordee.compute import adapter
from cordee.errors import Fault, UserError
from cordee.exporting.export import run

HOSTILE = "my|ch`ats<script>alert(1)</script>\n# _x_.jsonl"
FINGERPRINTS = {"sft": "a" * 64, "lora": "b" * 64, "benchmark": "c" * 64}
HOST = {"name": "secret-host", "cpu": "Example CPU", "cores": 2, "memory_bytes": 1, "gpu": None, "platform": "Linux"}


def publish(runs, stage, uses, **fields):
    given = {"recipe": "mine", "fingerprint": FINGERPRINTS[stage], "host": HOST, "packages": {"torch": "2.13.0"}}
    manifests.seal(runs / "mine" / f"{stage}@1", stage=stage, uses=uses, **{**given, **fields})


def figure(task, metric, value, error, chosen="none"):
    return {"task": task, "asked": "chat-2-shot", "metric": metric, "filter": chosen, "value": value,
            "standard_error": error, "documents": 7, "by_language": {}}  # fmt: skip


def results(*names):
    """`results.json` of some models: a task of two figures, and one that was asked as part of a group."""
    task = {"task": "gsm8k", "asked": "chat-2-shot", "is_asked": True, "is_group": False, "shots": 2, "version": 3.0,
            "metric": "exact_match", "filter": "strict-match", "higher_is_better": {"exact_match": True},
            "description": f"maths {HOSTILE}", "chance": None, "documents_in_all": 1319,
            "how": {"system_instruction": "Be | brief."}}  # fmt: skip
    part = {**task, "task": "part", "is_asked": False}
    models = [
        {"name": name, "dtype": "float32", "tasks": [task, part], "notes": {}, "commands": [], "documents": 7,
         "results": [figure("gsm8k", "exact_match", 0.25 + at / 7, 0.0123456789, "flexible"),
                     figure("gsm8k", "exact_match", 0.1234567890123 + at, None, "strict-match"),
                     figure("part", "exact_match", 0.9, None, "strict-match")]}
        for at, name in enumerate(names)
    ]  # fmt: skip
    return {"engine": {"name": "vllm", "version": "0.31.0+cpu", "dtype": "float32"}, "models": models}


@pytest.fixture
def runs(checkpoints, adapters, tmp_path):
    """A store: a model that was trained on chats of a hostile name, an adapter on it, a benchmark of three models."""
    root = tmp_path / "runs"
    sft, lora, benchmark = (root / "mine" / f"{stage}@1" for stage in FINGERPRINTS)
    shutil.copytree(checkpoints["first"], sft)
    (sft / "metrics.jsonl").write_text("{}\n")
    rows = {"path": f"/home/someone/{HOSTILE}", "rows": 12, "sequences": 11, "tokens": 500, "loss_tokens": 200,
            "left_out": [{"problem": "empty", "rows": 1, "first": []}]}  # fmt: skip
    files.write_json(sft / "rows.json", {"sources": [rows]})
    data = {"key": "data.0.path", "file": f"/home/someone/{HOSTILE}", "sha256": "d" * 64}
    base = {"key": "model", "file": "/home/someone/hub/models--owner--base/snapshots/0123abcd", "sha256": "e" * 64}
    fetched = {"key": "data.1.path", "file": "hub:datasets/owner/chats@0123abcd", "sha256": "9" * 64}
    apart = {"key": "heldout.0.path", "file": "/home/someone/heldout.jsonl", "sha256": "f" * 64}
    config = {"data": [{"path": f"content {'d' * 64}/.jsonl"}], "model": f"content {'e' * 64}", "trainer": {"lr": 1e-4}}
    publish(
        root, "sft", "posttrain.sft", inputs=[base, data, fetched, apart], seconds=65.0,
        identity={"config": config, "seed": 17}, metrics={"steps": 9, "tokens": 500, "loss": 1.5, "parameters": 98816},
    )  # fmt: skip
    shutil.copytree(adapters["small"], lora)
    told = files.read_json(lora / "adapter_config.json") | {"base_model_name_or_path": "../sft@1"}
    files.write_json(lora / "adapter_config.json", told)
    on = {"key": "model", "artifact": "mine/sft@1", "fingerprint": FINGERPRINTS["sft"]}
    publish(root, "lora", "posttrain.sft", inputs=[on], identity={"config": {"lora": {"r": 4}}, "seed": 17})
    benchmark.mkdir()
    files.write_json(benchmark / "results.json", results("tuned", "other", "small"))
    own = benchmark / "lm_eval" / "tuned" / "chat-2-shot"
    own.mkdir(parents=True)
    task = {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test"}
    files.write_json(own / "results_1.json", {"configs": {"gsm8k": task}})
    read = [
        {**on, "key": "models.tuned"},
        {"key": "models.other", "file": "other", "sha256": "0" * 64},
        {"key": "models.small", "artifact": "mine/lora@1", "fingerprint": FINGERPRINTS["lora"]},
    ]
    publish(root, "benchmark", "eval.benchmark", inputs=read)
    return root


@pytest.fixture
def export(cordee, runs, tmp_path):
    """Exports by the command, and returns the folder."""

    assert runs.is_dir()

    def call(what, name, *arguments):
        done = cordee("export", what, name, *arguments)
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    return call


def logits(model, ids):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


def test_a_model_is_exported_as_it_is(export, runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, out = runs / "mine" / "sft@1", export("mine/sft@1", "tuned")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in out.iterdir())
    assert all(files.sha256(out / name) == files.sha256(source / name) for name in names - {"README.md"})
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, out))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert logits(one, ids := tokenizer("Alle Menschen")["input_ids"]).equal(logits(other, ids))
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(source).chat_template


def test_an_adapter_is_exported_with_the_name_of_its_base(export, runs):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source, out = runs / "mine" / "lora@1", export("mine/lora@1", "small", "--base-model", "owner/tuned")
    base = runs / "mine" / "sft@1"
    one, other = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place) for place in (source, out)
    )
    assert logits(one, [0, 5, 6, 7]).equal(logits(other, [0, 5, 6, 7]))
    assert files.read_json(out / "adapter_config.json")["base_model_name_or_path"] == "owner/tuned"
    card = ModelCard.load(out / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("owner/tuned", "adapter")
    assert card.data.library_name == "peft"
    assert 'AutoModelForCausalLM.from_pretrained("owner/tuned", dtype="auto")' in card.text
    assert [result.metric_value for result in card.data.eval_results] == [2.1234567890123, 0.25 + 2 / 7]
    assert files.read_json(export("mine/lora@1", "again") / "adapter_config.json")["base_model_name_or_path"] is None


def test_the_cards_header_is_the_hubs(export):
    card = ModelCard.load(export("mine/sft@1", "tuned", "--licence", "apache-2.0") / "README.md")
    data = card.data.to_dict()
    assert {key: data[key] for key in data if key != "model-index"} == {
        "license": "apache-2.0", "base_model": "owner/base", "base_model_relation": "finetune",
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["cordee", "sft"],
        "datasets": ["owner/chats"],
    }  # fmt: skip
    assert card.data.model_name == "tuned"
    assert "| `datasets/owner/chats@0123abcd` | sft | owner/chats |" in card.text
    main, other = card.data.eval_results
    assert (main.dataset_type, main.dataset_config, main.dataset_split) == ("openai/gsm8k", "main", "test")
    assert (main.dataset_name, main.dataset_args) == ("gsm8k (chat-2-shot)", {"num_few_shot": 2, "task_version": 3.0})
    assert (main.metric_type, main.metric_value, main.metric_name) == (
        "exact_match", 0.1234567890123, "exact_match, strict-match",
    )  # fmt: skip
    assert other.metric_value == 0.25
    assert other.metric_args == {"standard_error": 0.0123456789, "documents": 7, "engine": "vllm 0.31.0+cpu, float32"}


def rows_of(text, heading):
    """The cells of the tables below a heading, as a Markdown reader sees them."""
    html = MarkdownIt("commonmark").enable("table").render(text)
    part = html.partition(f"<h2>{heading}</h2>")[2].partition("<h2>")[0]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in re.findall("<tr>(.*?)</tr>", part, re.DOTALL)]


def test_the_card_shows_figures_data_and_procedure(export):
    text = ModelCard.load(export("mine/sft@1", "tuned") / "README.md").text
    shown = [row for row in rows_of(text, "Evaluation") if row]
    assert [(row[0], row[1], row[3], row[4], row[6]) for row in shown] == [
        ("<code>gsm8k</code>", "chat-2-shot, system_instruction <code>Be | brief.</code>", "0.1235", units.NO_VALUE,
         "7 of 1,319"),
        ("", "", "0.2500", "0.0123", "7 of 1,319"),
    ]  # fmt: skip
    assert "Of `gsm8k` only 7 of 1,319 documents were measured" in text
    assert rows_of(text, "Procedure")[1][1:6] == ["supervised fine-tuning (SFT)", "9", "500", "1.5", "1 min 05 s"]
    chats, _, read = [row for row in rows_of(text, "Training data") if row]
    assert chats[1:] == ["sft", "unknown", "not recorded", f"<code>{'d' * 16}</code>"]
    assert read[2:] == ["12", "1", "11", "500", "200"]
    assert "Licence | not given" in text
    assert "trainer:" in text
    assert "the seed 0" in text or "the seed 17" in text


def test_what_data_spell_is_no_markup_and_no_path_is_told(export):
    out = export("mine/sft@1", "tuned")
    text = ModelCard.load(out / "README.md").text
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert "<script" not in html
    assert "<h1>" in html
    assert html.count("<h1>") == 1
    assert {len(row) for row in rows_of(text, "Training data") if row} == {5, 7}
    assert {len(row) for row in rows_of(text, "Evaluation") if row} == {9}
    everything = (out / "README.md").read_text()
    assert all(secret not in everything for secret in ("/home", "someone", "secret-host", "heldout"))


def test_a_folder_without_a_manifest_is_said_to_be_unknown(export, checkpoints):
    text = (export(str(checkpoints["second"]), "plain") / "README.md").read_text()
    assert "how it was made is not known here" in text
    assert "None: no benchmark in the store measured these weights." in text
    assert "model-index" not in text


def test_a_damaged_benchmark_is_named_and_no_figure_of_it_is_shown(export, runs):
    file = runs / "mine" / "benchmark@1" / "results.json"
    file.write_text(file.read_text().replace("0.1234567890123", "0.9234567890123"))
    text = (export("mine/sft@1", "tuned") / "README.md").read_text()
    assert "None: no benchmark in the store measured these weights." in text
    assert "A benchmark is left out: mine/benchmark@1, whose results.json is not what was published." in text


def damaged(runs, name="sft@1/model.safetensors"):
    path = runs / "mine" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_adapter_is_not_put_on_another_folder_of_its_base(runs, checkpoints):
    lora = runs / "mine" / "lora@1"
    assert adapter.placed_on(lora, checkpoints["first"]) != lora
    damaged(runs, "lora@1/adapter_model.safetensors")
    with pytest.raises(Fault, match="is damaged"):
        adapter.placed_on(lora, checkpoints["first"])


def pickled(runs):
    (runs / "mine" / "sft@1" / "model.safetensors").rename(runs / "mine" / "sft@1" / "pytorch_model.bin")


def bare(runs):
    for path in (runs / "mine" / "sft@1").glob("*token*"):
        path.unlink()
    (runs / "mine" / "sft@1" / "chat_template.jinja").unlink()


REFUSED = [
    (None, "sft@1", {"out": "runs"}, UserError, "runs: DIR: is there already; name a new folder, or delete it"),
    (None, "benchmark@1", {}, UserError, "is no Hugging Face model"),
    (None, "sft@1", {"licence": "Apache 2"}, UserError, "'Apache 2' is no licence as the hub spells them"),
    (None, "sft@1", {"base": "../base"}, UserError, "'../base' is no name of a model on the hub"),
    (None, "lora@1", {"gguf": True}, UserError, "is an adapter, which is not converted; merge it first"),
    (None, "sft@1", {"gguf": True}, UserError, "--gguf: llama.cpp's convert_hf_to_gguf.py is not on PATH; get it"),
    (pickled, "sft@1", {}, UserError, "holds no safetensors, and pytorch_model.bin is a pickle"),
    (bare, "sft@1", {}, UserError, "has no tokenizer"),
    (damaged, "sft@1", {}, Fault, "is damaged: its content differs from what was published"),
]


@pytest.mark.parametrize(("plant", "what", "given", "kind", "message"), REFUSED, ids=[row[-1][:30] for row in REFUSED])
def test_what_can_not_be_exported_is_one_line_and_leaves_nothing(
    plant, what, given, kind, message, runs, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if plant:
        plant(runs)
    options = {"out": "out", "licence": None, "base": None, "gguf": False, **given}
    with pytest.raises(kind, match=re.escape(message)):
        run(runs / "mine" / what, Path(options.pop("out")), Store(runs), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


@pytest.mark.usefixtures("runs")
def test_a_converter_that_fails_is_a_fault(cordee, tmp_path, monkeypatch):
    converter = tmp_path / "bin" / "convert_hf_to_gguf.py"
    converter.parent.mkdir()
    converter.write_text("#!/bin/sh\necho 'Model ApertusForCausalLM is not supported' >&2\nexit 1\n")
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", f"{converter.parent}{os.pathsep}{os.environ['PATH']}")
    done = cordee("export", "mine/sft@1", "out", "--gguf")
    assert done.returncode == 1
    assert "can't be converted to GGUF: Model ApertusForCausalLM is not supported" in done.stderr
    assert not Path(tmp_path / "out").exists()
