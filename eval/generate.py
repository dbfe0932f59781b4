"""Generates answers to the same held-out prompts from several checkpoints, side by side.

python -m eval.generate --config samples.yaml
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from cordee import files, model_folder, worker
from cordee.config import Config as Keys
from cordee.config import Engine, Execution, Input
from cordee.cost import Cost
from cordee.stage import Context

VERSION = 1
Generate = Callable[[Path, Sequence[Sequence[int]]], list[str]]


class Config(Keys):
    """Which checkpoints answer which prompts, and how."""

    models: dict[str, Input] = Field(min_length=1)
    """Checkpoints of one shape by name, in the order in which they were trained."""
    prompts: Input
    """Held-out prompts: JSON lines with `prompt` and `answer` (`$chats/heldout.jsonl`)."""
    max_prompts: int = Field(default=48, ge=1)
    """How many of them are answered; spread evenly over the languages."""
    max_tokens: int = Field(default=32, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 is greedy."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest prompt and answer together, in tokens; without it, all positions of the model."""
    engine: Engine = "auto"
    """`auto` takes vLLM where it is installed; which one answered stands beside the samples."""
    batch_size: Execution[int] = Field(default=16, ge=1)
    """Prompts at once, where transformers generates."""


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """At most `max_tokens` tokens for each prompt and model."""
    tokens = float(len(config.models) * config.max_prompts * config.max_tokens)
    models = [model_folder.cost(path, f"models.{name}", given) for name, path in config.models.items()]
    parameters = models[0].parameters
    return Cost(tokens=tokens, flops=2 * parameters * tokens if parameters else None, parameters=parameters)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write `samples.jsonl` and `engine.json`."""
    import json

    from cordee.compute import engine
    from eval import prompts

    engine.require_one_shape(dict(config.models))
    rows = prompts.spread(prompts.read(config.prompts), config.max_prompts)
    first = next(iter(config.models.values()))
    length = engine.longest_request(first, config.max_length)
    ids = prompts.encode(first, [row["prompt"] for row in rows], length - config.max_tokens, config.prompts)
    name = engine.choose(config.engine)
    generate = _with_vllm(config, context, first, length) if name == "vllm" else _with_transformers(config, context)
    samples: list[dict[str, Any]] = [
        {"prompt": row["prompt"], "reference": row["answer"], "kind": row.get("kind", ""),
         "language": row.get("language", ""), "outputs": {}}
        for row in rows
    ]  # fmt: skip
    for done, (model, folder) in enumerate(config.models.items()):
        context.progress(done, len(config.models), "models")
        if context.stop_requested():
            context.stop(f"model {done} of {len(config.models)}")
        for sample, text in zip(samples, generate(folder, ids), strict=True):
            sample["outputs"][model] = text
    files.write_text(
        context.out / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
    )
    files.write_json(context.out / "engine.json", engine.describe(name))
    return {"rows": len(samples), "engine": name}


def _with_vllm(config: Config, context: Context, first: Path, length: int) -> Generate:
    from cordee.compute import engine

    running = engine.start(first, length, context.seed)

    def generate(folder: Path, ids: Sequence[Sequence[int]]) -> list[str]:
        running.load(folder)
        return running.generate(ids, config.max_tokens, config.temperature, context.seed)

    return generate


def _with_transformers(config: Config, context: Context) -> Generate:
    from eval import prompts

    context.note("vLLM is not used: transformers generates")
    return lambda folder, ids: prompts.generate(
        folder, ids, config.max_tokens, config.temperature, context.seed, config.batch_size
    )


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
