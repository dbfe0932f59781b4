"""lm-eval as a library: task files with local data, its own vLLM and transformers backends, its own files kept.

What lm-eval does silently is made an error here: a request that it would cut at the left, a begin-of-text token that
would stand twice, a result file that could not be written.
"""

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cordee.compute import engine
from cordee.compute.model import open_model, open_tokenizer
from cordee.errors import Fault, UserError, nearest
from cordee.stage import Context

BOOTSTRAP_ITERATIONS = 1000


@dataclass(frozen=True)
class Task:
    """One lm-eval task file with its data filled in."""

    config: dict[str, Any]
    metric: str
    is_chat: bool
    about: dict[str, Any]

    @property
    def name(self) -> str:
        """The task's name, as lm-eval and the report have it."""
        return str(self.config["task"])


def read_task(path: Path, data: Mapping[str, Path]) -> Task:
    """Read a task file, and put the paths of the data in the place of their names.

    Raises:
        UserError: it is no task file, or names data that is not given.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        (metric,) = config["metric_list"]
        metadata, splits = config["metadata"], config["dataset_kwargs"]["data_files"]
        about = {"description": metadata["description"], "chance": metadata["chance"]}
        is_chat = bool(metadata["chat"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"is no task file: {error!r}", file=path, key="tasks") from error
    for split, name in splits.items():
        if name not in data:
            raise UserError(f"needs data named {name!r}", file=path, key="data", hint=nearest(name, data))
        splits[split] = str(data[name])
    about |= {"metric": metric["metric"], "higher_is_better": metric["higher_is_better"]}
    return Task(config, metric["metric"], is_chat, about)


class _Whole:
    """Mixed into lm-eval's backends: a request that is too long is an error instead of being cut at the left."""

    def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
        for _, context, continuation in requests:
            self._require(len(context) + len(continuation), 0)
        return super()._loglikelihood_tokens(requests, *arguments, **options)

    def generate_until(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
        for request in requests:
            text, wanted = request.args
            self._require(len(self.tok_encode(text)), wanted["max_gen_toks"])
        return super().generate_until(requests, *arguments, **options)

    def _require(self, tokens: int, generated: int) -> None:
        # vLLM wants room for one token that it generates, even where only log-probabilities are asked for.
        if tokens + generated > self.max_length - 1:
            room = self.max_length - 1 - generated
            raise UserError(f"a request has {tokens} tokens, and {room} have room", key="max_length")


class _WholeHFLM(_Whole, HFLM):
    """lm-eval's transformers backend, without silent cuts."""


class Models:
    """Opens one checkpoint after the other in one engine."""

    def __init__(self, name: str, max_length: int, batch_size: int, seed: int) -> None:
        self.name, self.max_length, self.batch_size, self.seed = name, max_length, batch_size, seed
        self.served: tuple[Any, engine.Engine] | None = None

    def open(self, folder: Path) -> Any:
        """The lm-eval model for a checkpoint; vLLM is started once and then given other weights."""
        if self.name == "transformers":
            model = open_model(folder, dtype=torch.float32).eval()
            lm = _WholeHFLM(
                pretrained=model, tokenizer=open_tokenizer(folder), batch_size=self.batch_size,
                max_length=self.max_length, add_bos_token=False,
            )  # fmt: skip
        elif self.served is None:
            lm = self._start(folder)
            self.served = lm, engine.Engine(lm.model, folder)
            self.served[1].check(folder)
        else:
            lm = self.served[0]
            self.served[1].load(folder)
        _require_same_ids(lm, folder)
        return lm

    def _start(self, folder: Path) -> Any:
        engine.prepare()  # before lm-eval's backend is imported: it asks for vLLM's version
        from lm_eval.models.vllm_causallms import VLLM

        class WholeVLLM(_Whole, VLLM):
            """lm-eval's vLLM backend, without silent cuts."""

        settings = engine.settings(folder, self.max_length, self.seed)
        length = settings.pop("max_model_len")
        # Each text brings its own begin-of-text token: the chat template writes it, and rolling windows prefix it.
        return WholeVLLM(
            pretrained=str(folder), batch_size="auto", max_length=length, add_bos_token=False,
            max_batch_size=settings["max_num_seqs"], **settings,
        )  # fmt: skip


def _require_same_ids(lm: Any, folder: Path) -> None:
    """Check that lm-eval sends a chat as the very ids that training saw.

    Raises:
        Fault: the ids differ.
    """
    turns = [{"role": "user", "content": "Which language is this?\n\nAll human beings are born free."}]
    tokenizer = open_tokenizer(folder)
    trained = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    sent = lm.tok_encode(lm.apply_chat_template(turns))
    if list(trained["input_ids"]) != list(sent):
        raise Fault(f"lm-eval sends other ids than the chat template gives: {sent[:4]}…", file=folder)


def measure(lm: Any, model: str, tasks: list[Task], limit: int | None, context: Context) -> dict[str, Any]:
    """Run the tasks on one model; lm-eval's own files go to `lm_eval/<model>/`.

    Raises:
        Fault: lm-eval did not write what it should have.
    """
    folder = context.out / "lm_eval"
    shutil.rmtree(folder / model, ignore_errors=True)
    os.environ.setdefault("TQDM_DISABLE", "1")
    measured: dict[str, Any] = {"results": {}, "by_language": {}, "headline": {}, "documents": 0}
    for is_chat in (True, False):
        chosen = [task for task in tasks if task.is_chat == is_chat]
        if not chosen:
            continue
        tracker = EvaluationTracker(output_path=str(folder))
        outcome = simple_evaluate(
            model=lm,
            model_args={"pretrained": model},
            tasks=[task.config for task in chosen],
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            apply_chat_template=is_chat,
            evaluation_tracker=tracker,
            random_seed=context.seed,
            numpy_random_seed=context.seed,
            torch_random_seed=context.seed,
            fewshot_random_seed=context.seed,
        )
        samples = outcome.pop("samples")
        for task in chosen:
            _add(measured, task, outcome["results"][task.name], samples[task.name])
        tracker.save_results_aggregated(results=outcome, samples=samples)
        for name, rows in samples.items():
            tracker.save_results_samples(task_name=name, samples=rows)
            _require_written(folder / model, f"samples_{name}_*.jsonl", len(rows))
        _require_written(folder / model, "results_*.json", 1)
    return measured


def _add(measured: dict[str, Any], task: Task, result: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add one task's figures, overall and by language."""
    key = next(key for key in result if key.partition(",")[0] == task.metric)
    error = result.get(f"{task.metric}_stderr,{key.partition(',')[2]}")
    measured["results"][task.name] = {
        task.metric: result[key],
        f"{task.metric}_stderr": error if isinstance(error, float) and math.isfinite(error) else None,
    }
    measured["by_language"][task.name] = _by_language(task, rows)
    measured["headline"][f"{task.name}.{task.metric}"] = result[key]
    measured["documents"] += len(rows)


def _by_language(task: Task, rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """A task's metric for each language, from lm-eval's own rows."""
    groups: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        groups[row["doc"].get("language", "")].append(row[task.metric])
    if task.metric == "bits_per_byte":  # a row is (log-likelihood in nats, bytes)
        return {
            name: -sum(nats for nats, _ in values) / sum(size for _, size in values) / math.log(2)
            for name, values in sorted(groups.items())
        }
    return {name: sum(values) / len(values) for name, values in sorted(groups.items())}


def _require_written(folder: Path, pattern: str, lines: int) -> None:
    """lm-eval only warns when it can't write: look for its file."""
    found = sorted(folder.glob(pattern))
    if not found or found[-1].read_text(encoding="utf-8").count("\n") < lines - 1:
        raise Fault(f"lm-eval did not write {pattern}", file=folder, hint="look for its warning in the log")
