"""Generates answers to the same held-out prompts from several checkpoints, side by side.

python -m eval.generate --config samples.yaml
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cordee import files, model_folder, worker
from cordee.config import Config as Keys
from cordee.config import Engine, Execution, Input
from cordee.cost import Cost
from cordee.stage import Context

if TYPE_CHECKING:
    from cordee.compute.engine import Settings

VERSION = 2
Generate = Callable[[Path, Sequence[Sequence[int]]], tuple[list[str], str]]
"""Continues prompts of token ids with a checkpoint; returns the texts, and the dtype that was computed in."""


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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What is computed in. `auto` is the stored dtype, but bfloat16 where vLLM is given float32; it stands beside the
    samples."""
    enforce_eager: bool | None = None
    """Whether vLLM runs without compiling; if not given, on a CPU."""
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

    for model, folder in config.models.items():
        model_folder.require(folder, f"models.{model}")
    name = engine.choose(config.engine)
    if name == "vllm":
        engine.require_one_engine(dict(config.models))
    rows = prompts.spread(prompts.read(config.prompts), config.max_prompts)
    first = next(iter(config.models.values()))
    length = engine.longest_request(first, config.max_length)
    ids = prompts.encode(first, [row["prompt"] for row in rows], length - config.max_tokens, config.prompts)
    settings = engine.Settings(name, config.max_length, config.dtype, config.enforce_eager)
    generate = (_with_vllm if name == "vllm" else _with_transformers)(config, settings, context)
    samples: list[dict[str, Any]] = [
        {"prompt": row["prompt"], "reference": row["answer"], "kind": row.get("kind", ""),
         "language": row.get("language", ""), "outputs": {}}
        for row in rows
    ]  # fmt: skip
    dtypes: dict[str, None] = {}
    for done, (model, folder) in enumerate(config.models.items()):
        context.progress(done, len(config.models), "models")
        if context.stop_requested():
            context.stop(f"model {done} of {len(config.models)}")
        texts, dtype = generate(folder, ids)
        dtypes[dtype] = None
        for sample, text in zip(samples, texts, strict=True):
            sample["outputs"][model] = text
    files.write_text(
        context.out / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
    )
    files.write_json(context.out / "engine.json", {**settings.describe(), "dtype": ", ".join(dtypes)})
    return {"rows": len(samples), "engine": name}


def _with_vllm(config: Config, settings: "Settings", context: Context) -> Generate:
    from cordee.compute import engine

    running = engine.start(settings, list(config.models.values()))

    def generate(folder: Path, ids: Sequence[Sequence[int]]) -> tuple[list[str], str]:
        running.load(folder)
        return running.generate(ids, config.max_tokens, config.temperature, context.seed), running.dtype

    return generate


def _with_transformers(config: Config, settings: "Settings", context: Context) -> Generate:
    from cordee.compute import device
    from cordee.compute.model import open_model
    from eval import prompts

    context.note("vLLM is not used: transformers generates")

    def generate(folder: Path, ids: Sequence[Sequence[int]]) -> tuple[list[str], str]:
        model = open_model(folder, dtype=settings.torch_dtype).eval().to(device.default())
        chosen = config.max_tokens, config.temperature, context.seed, config.batch_size
        return prompts.generate(model, folder, ids, *chosen), str(model.dtype).removeprefix("torch.")

    return generate


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
