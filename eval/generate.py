"""Generates answers to prompts from several checkpoints and adapters: to compare them, or as data to train on.

python -m eval.generate --config samples.yaml
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from cordee import files, machine, model_folder, units, worker
from cordee.chat.source import BadRows, Source
from cordee.config import Execution, Input
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.model_folder import ModelInput
from cordee.stage import Context
from eval.measuring.asked import Name
from eval.measuring.sampling import Sampling
from eval.measuring.settings import ModelsConfig

if TYPE_CHECKING:
    from cordee.compute.engine import Settings
    from cordee.compute.generating import Generated
    from cordee.compute.serving import Engines
    from eval.measuring.parts import Ask, Told, Writer
    from eval.measuring.prompts import Encoder, Prompt, Prompts

VERSION = 6
SHOWN = 200
"""Prompts whose answers stand side by side in `samples.jsonl`, for the report."""


class Config(ModelsConfig):
    """Which checkpoints answer which prompts, and how."""

    models: dict[Name, ModelInput] = Field(min_length=1)
    """Checkpoints and LoRA adapters by names that files can have, in the order in which they were trained. An adapter
    answers on its base, which its `adapter_config.json` names, without being merged."""
    prompts: Input
    """A data file, or a folder of such files: rows with `prompt`, a text or messages, and `answer` where there is one;
    or chats in any shape, which are asked up to their last answer. `tools` and `system` are asked too."""
    split: str | None = None
    """Which split of a folder is read; `train` if not given and there are several."""
    subset: str | None = None
    """Which subset of a folder is read, where its README names several."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of the prompts to rename, such as `{question: prompt}`."""
    ignore: list[str] = Field(default_factory=list)
    """Columns and keys of messages that are left out, though they hold something that the chat template can't use."""
    bad_rows: BadRows = "error"
    """Prompts that a model can't be asked, or that are too long: an error, or left out for all models and counted."""
    max_prompts: int | None = Field(default=48, ge=1)
    """How many prompts are answered, spread evenly over the languages; `null` for all of them."""
    partition: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 1)
    """Which part of the prompts is answered, and of how many: `[2, 8]` takes every eighth one, from the second on, with
    the answers that it would have among all. Each part is a stage of its own; who reads them takes them all."""
    n: int = Field(default=1, ge=1)
    """Answers to each prompt; more than one needs a temperature."""
    max_tokens: int = Field(default=32, ge=1)
    """Longest answer, in tokens; how many were cut off is counted."""
    sampling: Sampling = Sampling()
    """How tokens are drawn, by the names of vLLM's `SamplingParams`: `{temperature: 0.7, top_p: 0.95}`."""
    batch_size: Execution[int | None] = Field(default=None, ge=1)
    """Answers that are generated and written together: what a kill can cost. Without it 16 where transformers
    generates, 64 with vLLM on a CPU and 4096 on a GPU."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Check what no key alone can tell."""
        if self.partition[0] > self.partition[1]:
            raise UserError(f"part {self.partition[0]} of {self.partition[1]} does not exist", key="partition")
        if self.n > 1 and self.sampling.temperature == 0:
            problem = f"{self.n} answers to a prompt are all the same at temperature 0, which is greedy"
            raise UserError(problem, key="n", hint="sampling: {temperature: 1.0}")
        if self.sampling.min_tokens > self.max_tokens:
            problem = f"{self.sampling.min_tokens} tokens are more than max_tokens={self.max_tokens}"
            raise UserError(problem, key="sampling.min_tokens")
        if self.engine == "transformers":
            self.sampling.for_transformers()
        for name, folder in self.models.items():
            if (longest := self.max_length or model_folder.positions(folder)) and self.max_tokens >= longest:
                problem = f"{self.max_tokens} tokens leave no place for a prompt: models.{name} takes {longest} in all"
                raise UserError(problem, key="max_tokens")
        return self

    def source(self) -> Source:
        """What the prompts are read from."""
        return Source(path=self.prompts, split=self.split, subset=self.subset, columns=self.columns, ignore=self.ignore)

    def answers_at_once(self) -> int:
        """How many answers a part has."""
        if self.batch_size:
            return self.batch_size
        return 16 if self.engine == "transformers" else 4096 if machine.has_gpu() else 64


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """At most `max_tokens` tokens for each answer."""
    models = [model_folder.cost(path, f"models.{name}", given) for name, path in config.models.items()]
    parameters, prompts = models[0].parameters, config.max_prompts or _rows(config, given)
    answers = len(config.models) * prompts * config.n / config.partition[1] if prompts else None
    tokens = answers * config.max_tokens if answers else None
    flops = 2 * parameters * tokens if parameters and tokens else None
    return Cost(tokens=tokens, flops=flops, parameters=parameters, rows=answers)


def _rows(config: Config, given: dict[str, Cost]) -> float | None:
    """About how many prompts there are, where it is known."""
    from cordee.chat.selection import files_of
    from cordee.data.rows import estimate

    if not config.prompts.exists():
        return given.get("prompts", Cost()).rows
    return estimate(files_of(config.source(), "prompts").documents, "prompts")[0]


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write `answers/<model>.jsonl`, `samples.jsonl`, `prompts.json` and `engine.json`."""
    from cordee.compute import engine, serving
    from eval.measuring import parts, prompts

    settings = replace(config.settings(context), draws=config.sampling.temperature > 0)
    source = config.source()
    encoders = {}
    for model, folder in config.models.items():
        longest = engine.longest_request(folder, config.max_length) - config.max_tokens
        encoders[model] = prompts.Encoder.of(model, folder, longest, source.ignore, context.note)
    context.waits("the prompts")
    chosen = prompts.choose(source, config.max_prompts, context.note).share(*config.partition)
    asked, problems = prompts.checked(chosen, list(encoders.values()), context, may_drop=config.bad_rows == "drop")
    for kind in problems.kinds.values():
        context.note(f"{kind.count} prompts left out: {kind.problem}")
    told = {"rows": len(asked.kept), "asked": len(asked), "left_out": problems.described()}
    files.write_json(context.out / "prompts.json", told)

    seed = context.seed if config.sampling.seed is None else config.sampling.seed
    writers = {
        model: parts.Writer(context.out, model, encoder.template is None, config.n, seed)
        for model, encoder in encoders.items()
    }
    coming = {model: folder for model, folder in config.models.items() if not writers[model].file.exists()}
    engines = serving.Engines(settings, list(coming.values())) if settings.name == "vllm" and coming else None
    each = len(asked) * config.n
    for model in engines.in_turn(coming) if engines else coming:
        done = each * sum(writer.file.exists() for writer in writers.values())
        context.waits(f"{settings.name} with {config.models[model]}")
        ask, dtype = _asker(config, settings, engines, encoders[model])
        _write_engine(context, settings, model, dtype)
        writers[model].write(asked, config.answers_at_once(), ask, context, done, each * len(writers))
        del ask  # and its model, before the next one is opened
    if engines:
        engines.stop()
    shutil.rmtree(context.out / parts.PARTS, ignore_errors=True)
    return _summary(config, context, asked, writers) | {"engine": settings.name}


def _asker(config: Config, settings: "Settings", engines: "Engines | None", encoder: "Encoder") -> "tuple[Ask, str]":
    """What has a model answer, by vLLM where it runs, else by transformers; and the dtype that is computed in."""
    from cordee.chat.problems import Problems
    from cordee.compute import adapter, device, generating

    folder = config.models[encoder.name]
    running: Callable[..., list[Generated]]
    if engines:
        engine = engines.load(folder)
        running, dtype = engine.generate, engine.dtype
        given: dict[str, Any] = {"sampling": config.sampling.for_vllm()}
    else:
        opened = adapter.open_served(folder, dtype=settings.torch_dtype).eval().to(device.default())
        running, dtype = partial(generating.generate, opened, folder), str(opened.dtype).removeprefix("torch.")
        given = {"sampling": config.sampling.for_transformers(), "batch_size": config.answers_at_once()}

    def ask(part: "Sequence[Prompt]", seeds: Sequence[int]) -> "list[Generated]":
        problems = Problems()
        ids = [one for one in encoder.encode(part, problems) for _ in range(config.n)]
        problems.raise_any(config.prompts, len(part))
        return running(ids, seeds, max_tokens=config.max_tokens, **given)

    return ask, dtype


def _write_engine(context: Context, settings: "Settings", model: str, dtype: str) -> None:
    """Write `engine.json`, which holds the dtypes of the models so far."""
    path = context.out / "engine.json"
    dtypes = {**(files.read_json(path)["dtypes"] if path.exists() else {}), model: dtype}
    computed_in = ", ".join(dict.fromkeys(dtypes.values()))
    files.write_json(path, {**settings.describe(), "dtype": computed_in, "dtypes": dtypes})


def _summary(config: Config, context: Context, asked: "Prompts", writers: "dict[str, Writer]") -> dict[str, Any]:
    """Write the answers to some prompts side by side, and count all of them."""
    from eval.measuring import parts, prompts

    some = prompts.thinned(asked, SHOWN)
    shown = {int(number) for number in some.kept.nonzero()[0]}
    told: dict[str, Told] = {model: parts.tell(writer.file, shown) for model, writer in writers.items()}
    for model, found in told.items():
        for count, what in ((found.cut, f"cut off at max_tokens={config.max_tokens}"), (found.empty, "empty"),
                            (found.special, "without special tokens that were generated")):  # fmt: skip
            if count:
                share = units.score(count / found.answers, percent=True)
                context.note(f"{model}: {count} of {found.answers} answers ({share}) are {what}")
    rows = [
        {"prompt": one.shown, "reference": one.reference, "kind": str(one.record.values.get("kind") or ""),
         "language": str(one.record.values.get("language") or ""),
         "outputs": {model: found.shown[one.number] for model, found in told.items()}}
        for one in some
    ]  # fmt: skip
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files.write_text(context.out / "samples.jsonl", text)
    totals = {name: sum(getattr(found, name) for found in told.values()) for name in ("tokens", "cut", "empty")}
    return {"rows": sum(found.answers for found in told.values()), "prompts": len(asked), **totals}


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()
