"""Opens a trainer for online RL with its prompts, its rewards and what samples for it."""

import importlib
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments

from cordee import peek
from cordee.chat.prompts import Prompt
from cordee.chat.tokenized import Tokenized
from cordee.compute.model import sequence_limits
from cordee.errors import UserError, nearest
from cordee.stage import Context
from posttrain.rewards.opening import Rewards
from posttrain.rollouts import collapse, heldout, mismatch, order, weights
from posttrain.rollouts.samplers import Beside, Colocated
from posttrain.rollouts.sampling import Sampler
from posttrain.rollouts.settings import MISMATCH, RolloutConfig, trainer_arguments
from posttrain.rollouts.trainer import Rollouts
from posttrain.rollouts.with_transformers import Transformers
from posttrain.rollouts.with_vllm import VllmArguments, config_json
from posttrain.training import adapter_settings, lm_head, reading, sampling, skeleton
from posttrain.training.metrics import TrainingData
from posttrain.training.sequences import Sequences
from posttrain.training.starts_at_reference import StartsAtReference

BY_BATCH = {"loss_type": "bnpo", "entropy_coef": 0.0, "use_adaptive_entropy": False, "top_entropy_quantile": 1.0}
"""Settings of TRL that are means over one micro-batch: a loss by its name, the others where they are not these."""
TOOLS_TOKENS = 1024
"""Places for the descriptions of tools, and for what an environment adds to a prompt."""
START_TOLERANCE = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.05}
"""Nats that the divergence from the reference may be before the first update, by what matrices are multiplied in."""


def open_run(
    kind: type[Rollouts], arguments: type[TrainingArguments], config: RolloutConfig, context: Context, **given: Any
) -> tuple[Rollouts, TrainingData]:
    """The trainer, whose prompts were checked here, and what it reads.

    Args:
        kind: the trainer's class.
        arguments: the class of TRL's config.
        config: the stage's config.
        context: where to write and to report, and the seed.
        given: further arguments of the trainer: `tools`, `environment_factory`.

    Raises:
        UserError: the data, the model, a reward or a key is wrong.
        Fault: vLLM does not start.
    """
    rewards = Rewards.open(config.rewards, context.note)
    asked = config.model_copy(update={"trainer": trainer_arguments(config)})
    settings = skeleton.arguments(arguments, asked, context)
    _check(config, settings, context)
    model, tokenizer = skeleton.open_model(config)
    tokenizer.clean_up_tokenization_spaces = False
    positions = sequence_limits(model, None).positions
    left = None if positions is None else positions - config.max_completion_length
    if left is not None and left < 1:
        problem = f"{config.max_completion_length} tokens leave no place for a prompt: the model has {positions}"
        raise UserError(problem, key="trainer.max_completion_length")
    longest = min((limit for limit in (config.max_prompt_length, left) if limit is not None), default=None)
    found, apart = reading.read(config, "prompts", model, tokenizer, longest, context, Tokenized.prompt)
    trainer = skeleton.open_trainer(
        kind, asked, model, settings, processing_class=tokenizer, reward_funcs=[*rewards.functions],
        train_dataset=dataset(found), eval_dataset=dataset(apart) if len(apart) else None, **given,
    )  # fmt: skip
    lm_head.use_own_logits(trainer, found[0].ids.tolist(), context)
    trainer.rewards = rewards
    _begin(trainer, config, tokenizer, int(found.lengths("ids").max()), context)
    if config.beta:
        trainer.add_callback(StartsAtReference({"kl": (0.0, START_TOLERANCE[config.computes_in])}))
    noted: dict[str, Any] = {"engine": config.engine}
    trainer.add_callback(collapse.Watches(context, noted))
    return trainer, _data(trainer, config, found, noted)


def _data(trainer: Rollouts, config: RolloutConfig, found: Sequences[Prompt], noted: dict[str, Any]) -> TrainingData:
    """What the skeleton is told of the prompts."""
    prompts = int(found.lengths("ids").sum())
    each = config.num_generations * config.num_iterations
    return TrainingData(
        trainer.counts, trainer.weights, rows=len(found),
        tokens=each * (prompts + len(found) * config.max_completion_length),
        sequence_length=prompts // len(found) + config.max_completion_length, digest=found.digest,
        has_reference=config.beta != 0, can_compile=False, order=order.set_order, measure=heldout.measure,
        epoch_rows=order.prompt_epochs(config, len(found)), extra=trainer, metrics=noted,
    )  # fmt: skip


def dataset(prompts: Sequences[Prompt]) -> Dataset:
    """Prompts as TRL takes them: `prompt`, `prompt_ids`, and each column that any row has, None where one has not."""
    columns = sorted({name for prompt in prompts for name in prompt.row})

    def rows(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [prompts[at] for at in batch["place"]]
        values = {name: [one.row.get(name) for one in found] for name in columns}
        return {**values, "prompt_ids": [one.ids.tolist() for one in found]}

    return Dataset.from_dict({"place": range(len(prompts))}).with_transform(rows)


def _check(config: RolloutConfig, settings: Any, context: Context) -> None:
    """Refuse settings that TRL would drop without a word, and note what depends on how a step is cut.

    Raises:
        UserError: there is one.
    """
    adapter_settings.require_dropout(config.lora, is_disabled=settings.disable_dropout)
    if config.lora and config.lora.get("bias", "none") != "none" and config.beta:
        problem = f"with {config.lora['bias']!r} biases stay trained while the adapter is off: there is no reference"
        raise UserError(problem, key="lora.bias", hint="leave it out, or write trainer.beta: 0")
    if config.beta and not config.trains_adapter and (config.adapter == "new" or config.added_tokens):
        problem = "the reference would be the model without the adapter that is merged, or without the tokens"
        raise UserError(problem, key="trainer.beta", hint="merge the adapter first (posttrain.merge), or write beta: 0")
    if config.vllm_mode == "server" and config.engine != "vllm":
        raise UserError("is for vLLM", key="vllm_mode", hint="engine: vllm")
    if config.engine == "vllm" and not peek.is_installed("vllm"):
        raise UserError("vLLM is not installed", key="engine", hint="pip install 'cordee[cpu]' or 'cordee[cuda]'")
    by_batch = _by_batch(settings)
    if by_batch:
        context.note(f"{', '.join(by_batch)}: TRL's loss depends on per_device_train_batch_size and the processes")
    if config.reshapes and config.max_logprob_mismatch is None:
        told = f"{', '.join(config.reshapes)}: completions are drawn from another distribution than the one trained"
        context.note(f"{told}, so their mismatch is measured and not bounded")


def _by_batch(settings: Any) -> list[str]:
    """The settings that make the loss a mean over one micro-batch of one process."""
    found = []
    for name, plain in BY_BATCH.items():
        value = getattr(settings, name, None)
        if value is not None and (value == plain) == (name == "loss_type"):
            found.append(name)
    return found


def _begin(
    trainer: Rollouts, config: RolloutConfig, tokenizer: PreTrainedTokenizerBase, longest: int, context: Context
) -> None:
    """Give the trainer what samples, and the limit of its mismatch."""
    stops = sampling.stops(config.model, tokenizer)
    if not stops:
        raise UserError("names no token that ends a generation", file=config.model, key="model")
    sampler = _sampler(trainer, config, stops, longest, context)
    usual = None if config.reshapes else MISMATCH[config.computes_in]
    limit = config.max_logprob_mismatch or usual
    bound = mismatch.Mismatch(limit, mismatch.advice(config.engine, config.computes_in, config.reshapes))
    sorts = not _by_batch(trainer.args)
    trainer.begin(sampler, bound, stops, context, corrects=config.engine == "vllm", sorts=sorts)


def _sampler(trainer: Rollouts, config: RolloutConfig, stops: list[int], longest: int, context: Context) -> Sampler:
    """What samples completions of prompts of at most `longest` tokens."""
    if config.engine == "transformers":
        return Transformers(trainer, stops, trainer.processing_class.pad_token_id)
    model = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    weights.require_addable(trainer.model)
    tools = TOOLS_TOKENS if getattr(trainer, "tools", None) else 0
    positions = sequence_limits(model, None).positions or longest + tools + config.max_completion_length
    length = trainer.args.vllm_max_model_length or longest + tools + config.max_completion_length
    processes = PartialState().num_processes
    arguments = VllmArguments(
        config_json(model.config, type(model).__name__), config.computes_in, min(length, positions), tuple(stops),
        trainer.args.vllm_gpu_memory_utilization, processes,
    )  # fmt: skip
    context.waits("vLLM")
    return (Beside if config.vllm_mode == "server" else Colocated)(trainer, arguments)


def imported(spelled: str, key: str) -> Any:
    """What `package.module:name` names.

    Raises:
        UserError: there is no such module, or nothing in it of that name.
    """
    module, _, name = spelled.partition(":")
    if not name:
        raise UserError(f"{spelled!r} names no module", key=key, hint="write package.module:name")
    try:
        opened = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"can't import {module}: {error}", key=key, hint="is its folder on PYTHONPATH?") from error
    found = getattr(opened, name, None)
    if not callable(found):
        known = [other for other, value in vars(opened).items() if callable(value) and other[0] != "_"]
        raise UserError(f"{module} has no {name!r} that can be called", key=key, hint=nearest(name, known))
    return found


def run(
    build: Callable[[Any, Context], tuple[Rollouts, TrainingData]], config: RolloutConfig, context: Context
) -> dict[str, Any]:
    """Train to the end, and end what samples, whatever happens; arguments and errors as for `skeleton.fit`."""
    opened: list[Rollouts] = []

    def kept(config: Any, context: Context) -> tuple[Rollouts, TrainingData]:
        trainer, data = build(config, context)
        opened.append(trainer)
        return trainer, data

    try:
        return skeleton.fit(kept, config, context)
    finally:
        for trainer in opened:
            trainer.rewards.close()
            trainer.sampler.close()
