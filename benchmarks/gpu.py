"""What one GPU does with each kind of training: speed, share of its peak, memory, and what fails.

    python benchmarks/gpu.py [--minutes 10] [--json gpu.json] [--only pretraining,resume]

Makes a corpus of invented words and a model with random weights (a Llama of one billion parameters; with `--shape
tiny`, which is taken where there is no GPU, a very small one), and runs the stages on them as `cordee run` does, each
with a share of the time. A part that fails or is late is told as such, and the next one begins. Nothing is downloaded,
and nothing is needed but what is installed. Speed is taken from the times at which steps are reported, without the
first ones; the share of the peak (MFU) counts 6 FLOPs a parameter and token and those of attention, against the peak of
dense bfloat16 in the maker's data sheet.
"""

import argparse
import contextlib
import dataclasses
import datetime as dt
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from processes import Failed, Process, step_s

ROOT = Path(__file__).resolve().parents[1]
CORDEE = [sys.executable, "-P", "-c", "from cordee.cli import main; main()"]
SKIPPED_STEPS = 4
"""Steps at the beginning whose time does not count."""
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12,
    "B200": 2250e12, "L40S": 362e12, "A10": 125e12, "4090": 165e12,
}  # fmt: skip
"""FLOP/s in dense bfloat16 by a part of the GPU's name, the first that fits; of the makers' data sheets."""
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """How large the model and its batches are."""

    fields: dict[str, int]
    """Of the model's config."""
    vocab_size: int
    length: int
    """Tokens of a row."""
    rows: int
    """Of a step."""
    at_once: int
    """Of a forward pass."""
    steps: int
    completion: int
    """Tokens of the longest completion."""


SHAPES = {
    "1b": Shape(
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8}, vocab_size=8192, length=2048, rows=16, at_once=8, steps=20, completion=128,
    ),
    "tiny": Shape(
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1}, vocab_size=512, length=128, rows=4, at_once=2, steps=12, completion=16,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing that is measured: a stage with its keys."""

    name: str
    uses: str
    keys: dict[str, Any]
    share: float = 0.12
    """Of all the time, what it may take."""
    proof: str = ""
    """The proof that is run in the place of the stage."""
    has_mfu: bool = True
    """Whether the FLOPs of the stage are those of the tokens that are counted."""

    @property
    def slug(self) -> str:
        """The name of its recipe."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


@dataclasses.dataclass
class Result:
    """What came of a part; None where nothing was measured."""

    name: str
    outcome: str
    seconds: float = 0.0
    tokens_per_s: float | None = None
    mfu: float | None = None
    step_s: float | None = None
    first_step_s: float | None = None
    """From the start of its process to the end of its first step."""
    gpu_bytes: int | None = None
    """The most that the card's memory held, of all processes."""
    loss: float | None = None


def main() -> None:
    """Run the parts one by one; print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="of the model (default: 1b with a GPU, else tiny)")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, also where there is a GPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="the file to write")
    parser.add_argument("--only", default="", help="names of parts, or how they begin, with commas between")
    asked = parser.parse_args()
    if asked.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, str(ROOT))
    from cordee import machine

    shape = SHAPES[asked.shape or ("1b" if machine.has_gpu() else "tiny")]
    end, wanted = time.monotonic() + 60 * asked.minutes, tuple(filter(None, asked.only.split(",")))
    results = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        place = Path(folder)
        chosen = [part for part in parts(shape, place) if not wanted or part.name.startswith(wanted)]
        for part in [None, *chosen]:
            limit_s = min((part.share if part else 0.15) * 60 * asked.minutes, end - time.monotonic())
            results.append(attempted(part, shape, place, limit_s))
            print(row(results[-1]), file=sys.stderr, flush=True)
            if part is None and results[-1].outcome != "done":
                break
    told = {**about(asked, shape), "parts": [dataclasses.asdict(result) for result in results]}
    asked.json.write_text(json.dumps(told, indent=2) + "\n")
    print(table(told, results))


def parts(shape: Shape, place: Path) -> list[Part]:
    """What is measured, the most important first."""
    tokens, model = {name: place / f"runs/data/{name}@1" for name in ("short", "long")}, str(place / "model")
    batch = {"global_batch_size": shape.rows, "per_device_train_batch_size": shape.at_once}
    fast = {"compile": "on", "deterministic": False, "logging_steps": 1, "resume_steps": 10_000, **batch}
    base = {
        "model": str(place / "model.yaml"), "data": [{"tokens": str(tokens["short"])}], "long_documents": "split",
        "sequence_length": shape.length, "max_steps": shape.steps, "learning_rate": 1e-4, **fast,
    }  # fmt: skip
    trainer = {"learning_rate": 1e-5, "max_steps": shape.steps, "max_length": shape.length}
    tuned = {"model": model, "data": [{"path": str(place / "chats.jsonl")}], "trainer": {**trainer, "packing": True}}
    flash = {**tuned["trainer"], "model_init_kwargs": {"attn_implementation": "flash_attention_2", "dtype": "bfloat16"}}
    prompts = {"model": model, "data": [{"path": str(place / "prompts.jsonl")}], "lora": LORA}
    sampled = {"learning_rate": 1e-5, "max_steps": shape.steps // 2, "max_completion_length": shape.completion}
    reward = {"function": "length_between", "most": 5 * shape.completion // 2, "unit": "characters"}
    small = {**base, "model": str(place / "small.yaml"), "deterministic": True, "compile": "off"}
    return [
        Part("pretraining: compiled", "pretrain.train", base),
        Part("pretraining: deterministic", "pretrain.train", {**base, "deterministic": True}),
        Part("pretraining: FSDP2 on one process", "pretrain.train",
             {**base, "launch": {"num_processes": 1, "config_file": str(place / "fsdp2.yaml")}}),
        Part("SFT: packed", "posttrain.sft", {**tuned, **fast}),
        Part("DPO: LoRA", "posttrain.dpo", {
            **prompts, **fast, "data": [{"path": str(place / "pairs.jsonl")}], "trainer": trainer, "compile": "off",
        }, has_mfu=False),
        Part("GRPO: LoRA and vLLM", "posttrain.grpo", {
            **prompts, **fast, "trainer": sampled, "engine": "vllm", "rewards": [reward],
            "compile": "off", "global_batch_size": 4 * shape.rows,
        }, share=0.2, has_mfu=False),
        Part("resume to the bit", "pretrain.train", small, proof="resume"),
        Part("pretraining: one document a row", "pretrain.train", {**base, "data": [{"tokens": str(tokens["long"])}]}),
        Part("pretraining: not compiled", "pretrain.train", {**base, "compile": "off"}),
        Part("SFT: packed with flash attention 2", "posttrain.sft",
             {**tuned, **fast, "trainer": flash, "compile": "off"}),
    ]  # fmt: skip


def attempted(part: Part | None, shape: Shape, place: Path, limit_s: float) -> Result:
    """Run a part, or without one make what all of them read; whatever fails is told."""
    result = Result(part.name if part else "corpus, tokenizer, tokens and model", "done")
    if limit_s < 1:
        result.outcome = "not started: no time is left"
        return result
    began = time.monotonic()
    try:
        with memory() as held:
            if part:
                run(part, place, limit_s, result)
            else:
                make(shape, place, limit_s)
        result.gpu_bytes = max(held, default=None)
    except (Failed, OSError, ValueError, LookupError, ArithmeticError) as error:
        said = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        result.outcome = f"failed: {said[-1].strip()[:300]}"
    result.seconds = round(time.monotonic() - began, 1)
    return result


def run(part: Part, place: Path, limit_s: float, result: Result) -> None:
    """Run a part as its user would, and read its speed from what it wrote."""
    recipe = place / f"{part.slug}.yaml"
    recipe.write_text(json.dumps({"name": part.slug, "seed": 1, "stages": {"run": {"uses": part.uses, **part.keys}}}))
    command = ["prove", str(recipe), part.proof] if part.proof else ["run", str(recipe)]
    began = time.time()
    call(command, place, limit_s)
    folder = place / "runs" / part.slug
    if part.proof:
        (certificate,) = folder.glob("*@1/certificate.json")
        result.outcome = f"done: {json.loads(certificate.read_text())['claim']}"
        return
    metrics = json.loads((folder / "run@1/manifest.json").read_text())["metrics"]
    events = [json.loads(line) for line in (folder / "logs/run@1/events.jsonl").read_text().splitlines()]
    done = [event for event in events if event.get("unit") == "steps" and event["done"]]
    result.loss, result.first_step_s = metrics.get("loss"), round(done[0]["time"] - began, 1)
    result.step_s = step_s(events, SKIPPED_STEPS)
    result.tokens_per_s = metrics["tokens"] / done[-1]["total"] / result.step_s
    if part.has_mfu and (peak := peak_flops()):
        result.mfu = metrics["flops"] / metrics["tokens"] * result.tokens_per_s / peak
    shutil.rmtree(folder)  # a model of one billion parameters takes four gigabytes


def make(shape: Shape, place: Path, limit_s: float) -> None:
    """Write texts, chats, pairs and prompts; make a tokenizer and tokens of them by the stages, and a model."""
    drawn, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"  # noqa: S311 - no secrets
    words = ["".join(drawn.choices(letters, k=drawn.randint(2, 9))) for _ in range(8 * shape.vocab_size)]
    wanted = 2 * shape.steps * shape.rows * shape.length

    def text(number: int) -> str:
        return " ".join(drawn.choices(words, k=number))

    stages: dict[str, dict[str, Any]] = {}
    for name, size in (("short", max(8, shape.length // 32)), ("long", shape.length)):
        count = -(-wanted // (2 * size))
        rows = [{"text": text(size), "part": "heldout" if at < 8 else "train"} for at in range(count)]
        lines(place / f"{name}.jsonl", rows)
        source, holdout = str(place / f"{name}.jsonl"), {"part": ["heldout"]}
        stages[f"{name}-corpus"] = {"uses": "pretrain.corpus", "source": source, "holdout": holdout}
    stages["tokenizer"] = {"uses": "pretrain.tokenizer", "corpus": "$short-corpus", "vocab_size": shape.vocab_size}
    for name in ("short", "long"):
        stages[name] = {"uses": "pretrain.tokens", "corpus": f"${name}-corpus", "tokenizer": "$tokenizer"}
    (place / "data.yaml").write_text(json.dumps({"name": "data", "stages": stages}))
    call(["run", str(place / "data.yaml")], place, limit_s)
    question, answer = max(4, shape.length // 32), max(6, shape.length // 16)
    user, number = "user", 2 * shape.steps * shape.rows
    asked = [[{"role": user, "content": text(question)}] for _ in range(number)]
    lines(place / "prompts.jsonl", [{"prompt": one} for one in asked])

    def said() -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text(answer)}]

    lines(place / "chats.jsonl", [{"messages": one + said()} for one in asked * 8])
    lines(place / "pairs.jsonl", [{"prompt": one, "chosen": said(), "rejected": said()} for one in asked])
    config = {"model_type": "llama", "max_position_embeddings": shape.length, "tie_word_embeddings": True}
    (place / "model.yaml").write_text(json.dumps({**config, **shape.fields}))
    (place / "small.yaml").write_text(json.dumps({**config, **shape.fields, "num_hidden_layers": 2}))
    settings = (ROOT / "configs/accelerate/fsdp2.yaml").read_text(encoding="utf-8")
    (place / "fsdp2.yaml").write_text(settings.replace("num_processes: 4", "num_processes: 1"))
    program = f"import gpu, pathlib; gpu.make_model(pathlib.Path({str(place)!r}))"
    for _ in Process([sys.executable, "-c", program], place, Path(__file__).parent, limit_s).lines():
        pass


def make_model(place: Path) -> None:
    """Write a model with random weights in bfloat16, with the tokenizer; in a process of its own, which opens torch."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "runs/data/tokenizer@1")
    fields = json.loads((place / "model.yaml").read_text()) | {"vocab_size": len(tokenizer)}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    fields.pop("model_type")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, **special)).bfloat16()
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def call(arguments: list[str], place: Path, limit_s: float) -> None:
    """Run a command of the product; its lines go to this process's standard error."""
    for line in Process([*CORDEE, *arguments, "--runs", str(place / "runs")], place, ROOT, limit_s).lines():
        sys.stderr.write(f"    {line}")


@contextlib.contextmanager
def memory() -> Iterator[list[int]]:
    """The bytes that the first GPU's memory holds, second by second; nothing where there is none."""
    held: list[int] = []
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop=1", "--id=0"]
    if not shutil.which(command[0]) or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield held
        return
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield held
        finally:
            process.terminate()
            said = process.communicate()[0].split()
            held += [int(number) << 20 for number in said if number.isdigit()]


def peak_flops() -> float | None:
    """What the GPU can do at most, in FLOP/s; None where that is not known."""
    from cordee import machine

    name = (machine.gpu() if machine.has_gpu() else None) or ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def about(asked: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """When, where and of what the figures are."""
    from cordee import machine, provenance

    found = provenance.git(ROOT)
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "commit": f"{found.commit[:12]}{' with changes' if found.dirty else ''}" if found else None,
        "hardware": provenance.host().model_dump(exclude={"name"})
        | {"gpu": machine.gpu() if machine.has_gpu() else None},
        "packages": provenance.packages(),
        "peak_flops_per_s": peak_flops(),
        "minutes": asked.minutes,
        "shape": dataclasses.asdict(shape),
    }


def table(told: dict[str, Any], results: list[Result]) -> str:
    """The results in Markdown, and below them what failed."""
    hardware, shape = told["hardware"], told["shape"]
    where = f"{hardware['gpu'] or 'no GPU'}, {hardware['cores']} cores of {hardware['cpu']}"
    versions = ", ".join(f"{name} {version}" for name, version in told["packages"].items())
    head = (
        f"{told['date']}, commit {told['commit']}: {where}; {versions}. Llama, {shape['fields']}, vocabulary "
        f"{shape['vocab_size']}; {shape['rows']} rows of {shape['length']} tokens a step.\n\n"
        "| part | tokens/s | MFU | a step | first step after | memory of the card | last loss | took | outcome |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    failed = [result.name for result in results if not result.outcome.startswith("done")]
    end = f"{len(failed)} of {len(results)} parts are not done{': ' if failed else ''}{', '.join(failed)}"
    return "\n".join([head, *map(row, results), "", end])


def row(result: Result) -> str:
    """A result as a line of the table."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    cells = [
        result.name, shown(result.tokens_per_s, "{:,.0f}"), shown(result.mfu, "{:.1%}"),
        shown(result.step_s, "{:.3f} s"), shown(result.first_step_s, "{:.0f} s"),
        shown(result.gpu_bytes and result.gpu_bytes / 1e9, "{:.1f} GB"), shown(result.loss, "{:.4f}"),
        f"{result.seconds:.0f} s", result.outcome.replace("|", "/"),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
