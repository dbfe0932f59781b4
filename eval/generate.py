"""Generates answers to the same held-out prompts from several checkpoints and adapters, side by side.

python -m eval.generate --config samples.yaml
"""

import json
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cordee import files, model_folder, worker
from cordee.config import Execution, Input
from cordee.cost import Cost
from cordee.stage import Context
from eval.measuring.settings import ModelsConfig

if TYPE_CHECKING:
    from cordee.compute.engine import Settings
    from cordee.compute.serving import Engines

VERSION = 4


class Config(ModelsConfig):
    """Which checkpoints answer which prompts, and how."""

    prompts: Input
    """Held-out prompts: a data file with `prompt`, and `answer` where there is one to show beside the models'
    (`$chats/heldout.jsonl`); or chats in any shape, which are asked up to their last answer."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of the prompts to rename, such as `{question: prompt}`."""
    max_prompts: int = Field(default=48, ge=1)
    """How many of them are answered; spread evenly over the languages."""
    max_tokens: int = Field(default=32, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 is greedy."""
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
    from cordee.compute import engine, serving
    from eval.measuring import prompts

    settings = config.settings(context)
    rows = prompts.spread(prompts.read(config.prompts, config.columns), config.max_prompts)
    asked, ids = [row["messages"] for row in rows], {}
    for model, folder in config.models.items():  # each in its own template and tokens
        longest = engine.longest_request(folder, config.max_length) - config.max_tokens
        ids[model] = prompts.encode(folder, asked, longest, config.prompts, context.note)
    engines = serving.Engines(settings, list(config.models.values())) if settings.name == "vllm" else None
    samples: list[dict[str, Any]] = [
        {"prompt": row["prompt"], "reference": row.get("answer"), "kind": row.get("kind", ""),
         "language": row.get("language") or "", "outputs": {}}
        for row in rows
    ]  # fmt: skip
    answers: dict[str, list[str]] = {}
    dtypes: dict[str, str] = {}
    for done, model in enumerate(engines.in_turn(config.models) if engines else config.models):
        context.progress(done, len(config.models), "models")
        context.stop_if_asked(f"model {done} of {len(config.models)}")
        answers[model], dtypes[model] = _answers(config, settings, engines, model, ids[model], context.seed)
    for model in config.models:
        for sample, text in zip(samples, answers[model], strict=True):
            sample["outputs"][model] = text
    files.write_text(
        context.out / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
    )
    computed_in = ", ".join(dict.fromkeys(dtypes[model] for model in config.models))
    files.write_json(context.out / "engine.json", {**settings.describe(), "dtype": computed_in})
    return {"rows": len(samples), "engine": settings.name}


def _answers(
    config: Config, settings: "Settings", engines: "Engines | None", model: str, ids: list[list[int]], seed: int
) -> tuple[list[str], str]:
    """A model's answers by vLLM, where it runs, else by transformers; and the dtype that was computed in."""
    from cordee.compute import adapter, device
    from eval.measuring import prompts

    chosen, folder = (config.max_tokens, config.temperature, seed), config.models[model]
    if engines:
        running = engines.load(folder)
        return running.generate(ids, *chosen), running.dtype
    opened = adapter.open_served(folder, dtype=settings.torch_dtype).eval().to(device.default())
    return prompts.generate(opened, folder, ids, *chosen, config.batch_size), str(opened.dtype).removeprefix("torch.")


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
