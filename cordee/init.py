"""Writes a recipe for what a person has: a model, and chats, pairs, a corpus, questions or tasks.

Each setting follows from the model's files, the beginning of the data and this machine, without torch.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cordee import files, machine, model_folder, units, yaml12
from cordee.errors import UserError
from cordee.look import Data, look

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SMALL = 30_000_000
"""Parameters up to which all weights are trained; of a larger model an adapter."""
SHOWN_ANSWERS = 8
EPOCHS = 3
"""Passes over a corpus."""
MODEL = """# Llama's architecture with about 7 million parameters; other fields are those of transformers' LlamaConfig.
model_type: llama
hidden_size: 256
intermediate_size: 1024
num_hidden_layers: 4
num_attention_heads: 4
num_key_value_heads: 2
max_position_embeddings: 2048
tie_word_embeddings: false
"""


@dataclass(frozen=True)
class Has:
    """What a person has."""

    model: Path | None = None
    chats: Path | None = None
    pairs: Path | None = None
    corpus: Path | None = None
    questions: Path | None = None
    tasks: tuple[str, ...] = ()
    data_dir: Path | None = None


def ask(prompt: Callable[..., str]) -> Has:
    """What a person says that there is; an empty answer: none."""

    def path(what: str) -> Path | None:
        told = prompt(f"{what} (empty: none)", default="", show_default=False).strip()
        return Path(told).expanduser() if told else None

    model = path("Folder of a model")
    if model is None:
        return Has(corpus=path("File or folder of texts to train a model on"))
    has = Has(model, path("File of chats to train on"), path("File of preference pairs to train on"))
    tasks = prompt("lm-eval's tasks to measure on (empty: none)", default="", show_default=False)
    questions = path("File of questions to measure on")
    return replace(has, questions=questions, tasks=tuple(filter(None, tasks.replace(" ", "").split(","))))


def write(has: Has, out: Path) -> list[Path]:
    """Write a recipe, and for a corpus the shape of the model that is trained on it beside the recipe.

    Returns:
        The files that were written.

    Raises:
        UserError: there is such a file, nothing can be made of what there is, or a file can't be read.
    """
    if out.exists():
        raise UserError("is there already", file=out, hint="name another file")
    made = [out]
    name = re.sub(r"[^\w-]+", "-", out.name.partition(".")[0]).strip("-") or "recipe"
    if has.chats or has.pairs:
        stages = list(_train(has, has.chats, "sft")) if has.chats else []
        stages += _train(has, has.pairs, "dpo") if has.pairs else []
    elif has.corpus:
        shape = out.with_suffix(".model.yaml")
        stages = list(_pretrain(has.corpus, shape))
        files.write_text(shape, MODEL)
        made.append(shape)
    elif has.model and (has.tasks or has.questions):
        _model(has)
        stages = []
    else:
        hint = "`--model M --chats FILE`, `--model M --pairs FILE`, `--corpus FOLDER` or `--model M --tasks gsm8k`"
        raise UserError("there is nothing to do", file="command line", hint=hint)
    head = [
        f"# Written by `cordee init`. `cordee plan {out}` shows what it will do and cost, `cordee run {out}` does it.",
        f"name: {name}",
        "seed: 17",
        "stages:",
    ]
    files.write_text(out, "\n".join([*head, *stages, *_measure(has), *_report(has)]) + "\n")
    return made


def _model(has: Has) -> Path:
    if has.model is None:
        raise UserError("a model is needed", file="command line", hint="--model FOLDER")
    if not has.model.exists() and re.fullmatch(r"(hub:)?[\w.-]+/[\w.-]+(@.+)?", str(has.model)):
        hint = (
            "`model: hub:owner/name` in a recipe is what `cordee fetch` fetches; it prints the folder, which init reads"
        )
        raise UserError(f"no folder {str(has.model)!r}", file="command line", key="--model", hint=hint)
    model_folder.require_served(has.model, "--model")
    return has.model


def _train(has: Has, path: Path, stage: str) -> Iterator[str]:
    """A stage that trains on chats or pairs, and the merge of its adapter."""
    model = _model(has)
    data = look(path, model, f"--{'chats' if stage == 'sft' else 'pairs'}")
    is_pair = data.shape == "preference pair"
    if is_pair != (stage == "dpo"):
        hint = "--pairs" if is_pair else "--chats"
        raise UserError(f"holds rows of the shape {data.shape!r}", file=path, hint=f"give it as {hint}")
    base = model_folder.served_base(model)
    parameters = model_folder.cost(model, "--model", {}).parameters or 0
    positions = model_folder.shape(files.read_json(base / "config.json")).positions or LENGTHS[-1]
    is_whole = stage == "sft" and _is_small(model)
    longest = next((length for length in LENGTHS if length >= data.percentile(0.99)), LENGTHS[-1])
    rows = 16 if data.rows >= 500 else 8 if data.rows >= 100 else 4
    epochs = 3 if data.rows < 1000 else 2 if data.rows < 10_000 else 1
    start = _word(model) if stage == "sft" or not has.chats else "$sft" if _is_small(model) else "$merged"
    yield f"  {stage}:"
    yield f"    uses: posttrain.{stage}"
    yield f"    model: {start}  # {_size(parameters)}"
    columns = f", columns: {yaml12.inline(data.columns)}" if data.columns else ""
    yield f"    # {_told(data)}"
    yield f"    data: [{{path: {_word(path)}{columns}}}]"
    if stage == "sft" or not has.chats:
        yield from _template(model)
    yield "    heldout: 0.05  # a share of the rows: its loss is measured before and after, and not trained on"
    yield "    overlong: drop  # rows longer than max_length; `truncate` cuts whole turns, `error` stops"
    yield f"    global_batch_size: {rows}  # rows of an optimizer step"
    yield f"    per_device_train_batch_size: {4 if machine.has_gpu() else 1}  # rows at once: memory and speed"
    yield f"    precision: {machine.fast_precision()}  # what this machine computes in fast"
    if not is_whole:
        yield "    lora: {r: 16, lora_alpha: 32, target_modules: all-linear}  # without it, all weights are trained"
    rate = {"sft": "2.0e-5" if is_whole else "2.0e-4", "dpo": "5.0e-6"}[stage]
    yield "    trainer:"
    yield f"      learning_rate: {rate}"
    yield f"      num_train_epochs: {epochs}"
    most = f"tokens; 99 % of the rows have at most {data.percentile(0.99)}"
    yield f"      max_length: {min(longest, positions)}  # {most}"
    yield "      lr_scheduler_type: cosine"
    yield "      warmup_steps: 5"
    if stage == "dpo":
        yield "      beta: 0.1  # how far the model may move from where it starts"
    if not is_whole:
        merged = "merged" if stage == "sft" else "aligned"
        yield f"  {merged}: {{uses: posttrain.merge, adapter: ${stage}}}  # one model of base and adapter"


def _is_small(model: Path) -> bool:
    """Whether all weights are trained in SFT."""
    return 0 < (model_folder.cost(model, "--model", {}).parameters or 0) <= SMALL


def _template(model: Path) -> Iterator[str]:
    """The key that gives a base model a chat template."""
    if not model_folder.chat_template(model_folder.tokenizer_of(model)):
        yield "    chat_template: chatml  # the model has none"
        yield "    added_tokens: ['<|im_start|>', '<|im_end|>']  # which the template writes"


def _pretrain(corpus: Path, shape: Path) -> Iterator[str]:
    """From a corpus to a small model."""
    data = look(corpus, None, "--corpus")
    if data.shape != "text":
        raise UserError(
            "has no column `text`", file=corpus, hint="`columns: {yours: text}` in the stage names its column"
        )
    tokens = data.rows * sum(data.lengths) // max(len(data.lengths), 1)
    steps = min(1000, max(40, tokens * EPOCHS // (16 * 256)))
    yield "  corpus:"
    yield "    uses: pretrain.corpus"
    yield f"    source: {_word(corpus)}  # {_told(data)}"
    yield "    holdout_fraction: 0.05  # documents that are never trained on: what is learned is measured on them"
    yield f"  tokenizer: {{uses: pretrain.tokenizer, corpus: $corpus, vocab_size: {_vocabulary(data.words)}}}"
    yield "  tokens: {uses: pretrain.tokens, corpus: $corpus, tokenizer: $tokenizer}"
    yield "  base:"
    yield "    uses: pretrain.train"
    yield f"    model: {_word(shape)}  # layers, width, heads"
    yield "    data: [{tokens: $tokens, weight: 1.0}]"
    yield "    long_documents: split  # of documents longer than a sequence"
    yield "    sequence_length: 256  # tokens"
    yield "    global_batch_size: 16  # sequences of an optimizer step"
    yield f"    max_steps: {steps}  # about {EPOCHS} times over the corpus, 40 to 1,000 steps"
    yield "    learning_rate: 2.0e-3"
    yield f"    warmup_steps: {steps // 10}"
    yield f"    decay_steps: {steps // 4}"
    yield f"    eval_steps: {steps // 4}  # steps between two measurements of the held-out documents"


def _vocabulary(words: int) -> int:
    """A vocabulary that a corpus of so many distinct words can fill: bytes, and a merge for every second word.

    It is a power of two where there are enough.
    """
    most = 257 + words // 2
    return most if most < 512 else min(8192, 1 << (most.bit_length() - 1))


def _trained(has: Has) -> dict[str, str]:
    """The models that are compared, by name."""
    if has.corpus and not has.model:
        return {"base": "$base"}
    found = {"before": _word(has.model)}
    if has.chats:
        found["sft"] = "$sft" if _is_small(_model(has)) else "$merged"
    if has.pairs:
        found["dpo"] = "$aligned"
    return found


def _measure(has: Has) -> Iterator[str]:
    """The stages that compare the models before and after."""
    models = ", ".join(f"{name}: {place}" for name, place in _trained(has).items())
    dtype = machine.fast_precision()
    settings = [f"    dtype: {dtype}", *([] if machine.has_gpu() else ["    enforce_eager: true  # starts sooner"])]
    if path := has.chats or has.pairs:
        yield "  answers:"
        yield "    uses: eval.generate"
        yield f"    models: {{{models}}}"
        yield f"    prompts: {_word(path)}  # better: prompts of your own that are not trained on"
        if asked := {old: new for old, new in look(path, None, "--chats").columns.items() if new == "prompt"}:
            yield f"    columns: {yaml12.inline(asked)}"
        yield f"    max_prompts: {SHOWN_ANSWERS}"
        yield "    max_tokens: 256  # of an answer"
        yield from settings
    if not has.tasks and not has.questions:
        return
    yield "  benchmark:"
    yield "    uses: eval.benchmark"
    yield f"    models: {{{models}}}"
    if has.tasks:
        yield f"    tasks: [{', '.join(map(_word, has.tasks))}]  # lm-eval's names, or task files"
    if has.questions:
        yield f"    questions: {_word(has.questions)}"
    if has.data_dir:
        yield f"    data_dir: {_word(has.data_dir)}  # the hub's data sets by their names"
    chats = "true" if has.chats or has.pairs or (has.model and not list(_template(has.model))) else "false"
    yield f"    apply_chat_template: {chats}  # whether questions are asked as chats"
    yield "    limit: 100  # documents of each task; without it, all"
    yield "    batch_size: auto"
    yield from settings


def _report(has: Has) -> Iterator[str]:
    """The page that shows it all."""
    made = [place for place in _trained(has).values() if place.startswith("$")]
    made += ["$answers"] if has.chats or has.pairs else []
    made += ["$benchmark"] if has.tasks or has.questions else []
    yield "  report:"
    yield "    uses: eval.report"
    yield f"    artifacts: [{', '.join(made)}]"
    yield "    certificates: [$certificates]  # of `cordee prove`"


def _word(path: object) -> str:
    """A path or a name as YAML has it."""
    return yaml12.inline(str(path))


def _told(data: Data) -> str:
    lengths = f"; tokens, estimated: median {data.percentile(0.5)}, longest of those looked at {data.percentile(1.0)}"
    return f"about {units.count(data.rows)} rows ({data.shape}){lengths if data.lengths else ''}"


def _size(parameters: float) -> str:
    return f"{units.count(parameters)} parameters" if parameters else "of a size that its files do not tell"
