"""What the stages that train on their own completions can be told, and what of TRL's settings they set themselves."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from cordee import model_folder
from cordee.config import Engine, Execution
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.memory import BYTES
from posttrain.rewards.settings import RewardList
from posttrain.training import memory
from posttrain.training.cost import source_cost, training_cost
from posttrain.training.settings import EPOCHS, OWNED, TrlConfig

MAX_PROMPT_LENGTH = 512
"""Tokens of a prompt where only a guess is possible."""
MISMATCH = {"float32": 0.01, "float16": 0.02, "bfloat16": 0.1}
"""Nats that log-probabilities of sampled tokens may differ on average, by what matrices are multiplied in; float16
rounds to 11 bits, bfloat16 to 8."""
ROLLOUT_OWNED = OWNED | {
    **dict.fromkeys(
        (
            # completions are kept and shown by the stage
            *("log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts"),
            *("log_completions_hub_repo", "logging_first_step", "per_device_eval_batch_size"),
            # vLLM: what the stage starts, and how
            *("vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex", "vllm_server_base_url"),
            *("vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
            "vllm_tensor_parallel_size",
            # transformers: how it generates
            *("cache_implementation", "ds3_gather_for_generation", "use_transformers_continuous_batching"),
            *("transformers_continuous_batching_config", "use_transformers_paged"),
            # a reference that is moved during the training is not part of a resume point
            *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
            "label_smoothing_factor",
        ),
        "",
    ),
    "use_vllm": "the stage's `engine`",
    "vllm_mode": "the stage's `vllm_mode`",
    "steps_per_generation": "trainer.generation_batch_size, in completions",
    "reward_weights": "`weight` beside each of the stage's `rewards`",
    "generation_kwargs": "trainer.temperature, top_p, top_k, min_p or repetition_penalty",
    "chat_template_kwargs": "a column of that name in the data",
    "train_sampling_strategy": "trainer.shuffle_dataset",
    "vllm_importance_sampling_cap": "trainer.vllm_importance_sampling_clip_max",
}
"""Fields of `trl.GRPOConfig` and `trl.RLOOConfig` that no recipe sets under `trainer:`."""


class RolloutConfig(TrlConfig):
    """Base of the stages that train on completions of the model itself; a row of a batch is a completion."""

    defaults: ClassVar[Mapping[str, float]] = {}
    """TRL's own defaults of `num_generations`, `max_completion_length` and `beta`, which each method has others of."""
    rewards: RewardList = Field(default_factory=list)
    """What completions are worth: functions, reward models and judges, summed by weight, each logged by its name."""
    engine: Engine = "auto"
    """What samples the completions; `auto`: vLLM where it is installed."""
    vllm_mode: Execution[Literal["colocate", "server"]] = "colocate"
    """Where vLLM runs: in the trainer's process, or in one beside it (with GPUs, on the first one that no trainer
    uses)."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Tokens of the longest prompt; a longer one is treated as `overlong` says. By default what the model's positions
    leave beside `max_completion_length`."""
    max_logprob_mismatch: float | None = Field(default=None, gt=0)
    """Nats by which the log-probabilities of sampled tokens may differ, on average over a step, between what sampled
    them and the trainer; beyond it the training ends. By default 0.01 in float32, 0.02 in float16 and 0.1 in bfloat16,
    and none with `top_p`, `top_k`, `min_p` or `repetition_penalty`, which draw from another distribution."""

    @property
    def num_generations(self) -> int:
        """Completions of each prompt."""
        return int(self.trainer.get("num_generations") or self.defaults["num_generations"])

    @property
    def max_completion_length(self) -> int:
        """Tokens of the longest completion."""
        return int(self.trainer.get("max_completion_length") or self.defaults["max_completion_length"])

    @property
    def beta(self) -> float:
        """The weight of the divergence from the reference; 0: there is no reference."""
        return float(self.trainer.get("beta", self.defaults["beta"]))

    @property
    def num_iterations(self) -> int:
        """How often a step is taken on each completion."""
        return int(self.trainer.get("num_iterations") or 1)

    @property
    def generation_batch_size(self) -> int:
        """Completions that are sampled at once, from the same weights."""
        return int(self.trainer.get("generation_batch_size") or self.global_batch_size)

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on what is sampled at once."""
        return self.generation_batch_size // self.global_batch_size * self.num_iterations

    @property
    def longest(self) -> int:
        """Tokens in the longest sequence."""
        return (self.max_prompt_length or MAX_PROMPT_LENGTH) + self.max_completion_length

    @property
    def reshapes(self) -> list[str]:
        """The keys by which completions are drawn from another distribution than the one that is trained."""
        plain = {"top_p": (None, 1, 1.0), "top_k": (None, 0, -1), "min_p": (None, 0, 0.0)}
        plain["repetition_penalty"] = (None, 1, 1.0)
        return [name for name, values in plain.items() if self.trainer.get(name) not in values]

    @model_validator(mode="after")
    def _fits_rollouts(self) -> "RolloutConfig":
        for name in ("num_generations", "max_completion_length", "num_iterations", "generation_batch_size"):
            value = self.trainer.get(name, 1)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"must be a whole number above 0, not {value!r}", key=f"trainer.{name}")
        if self.generation_batch_size % self.global_batch_size:
            problem = f"{self.generation_batch_size} completions are no multiple of global_batch_size"
            hint = f"leave it out, or write a multiple of {self.global_batch_size}"
            raise UserError(problem, key="trainer.generation_batch_size", hint=hint)
        if self.global_batch_size % self.num_generations:
            problem = f"{self.global_batch_size} completions are no multiple of num_generations={self.num_generations}"
            raise UserError(problem, key="global_batch_size", hint="a step takes all completions of a prompt")
        if self.overlong not in ("error", "drop"):
            raise UserError("a prompt is not shortened", key="overlong", hint="write error or drop")
        if self.compile == "on":
            problem = "completions have other lengths in each step, and another forward pass samples them"
            raise UserError(problem, key="compile", hint='say "auto" or "off"')
        return self


def rollout_cost(config: RolloutConfig, given: Mapping[str, Cost]) -> Cost:
    """At most: each completion has `max_completion_length` tokens, which are sampled, and trained on with the prompt.

    Raises:
        UserError: the beginning of a source shows that it can't be used, or the model is none.
    """
    parts = [
        (source_cost(source, f"data.{place}.path", given, "prompts", config.bad_rows), source.weight)
        for place, source in enumerate(config.data)
    ]
    rows = [part.rows * weight for part, weight in parts if part.rows is not None]
    prompts = sum(rows) if len(rows) == len(parts) else None
    asked = [part.tokens * weight for part, weight in parts if part.tokens is not None]
    mean = sum(asked) / prompts if prompts and len(asked) == len(parts) else MAX_PROMPT_LENGTH
    steps, epochs = int(config.trainer.get("max_steps", -1)), float(config.trainer.get("num_train_epochs", EPOCHS))
    completions: float | None = float(steps * config.global_batch_size)
    if steps <= 0:
        completions = None if prompts is None else prompts * epochs * config.num_generations * config.num_iterations
    tokens = None if completions is None else completions * (mean + config.max_completion_length)
    cost = training_cost(config, given, tokens, (tokens or 0.0) if config.beta else 0.0)
    cost = memory.with_frozen(cost, _frozen_bytes(config, given, cost.parameters))
    if cost.flops is None or completions is None:
        return cost
    sampled = completions / config.num_iterations * (mean + config.max_completion_length)
    return replace(cost, rows=completions, flops=cost.flops + 2.0 * (cost.parameters or 0.0) * sampled)


def _frozen_bytes(config: RolloutConfig, given: Mapping[str, Cost], parameters: float | None) -> float | None:
    """Bytes of the weights on one device beside those that are trained; vLLM's cache of keys and values is not counted.

    TRL opens the reference as a model of its own, and shards it as the other; of an adapter it is the base.
    """
    if parameters is None:
        return None
    devices, found = config.launch.devices(), 0.0
    if config.beta and not config.trains_adapter:
        found += memory.stored_bytes(config) * parameters / (devices.count if devices.sharded else 1)
    if config.engine == "vllm" and config.vllm_mode == "colocate":
        found += BYTES[config.computes_in] * parameters
    for at, reward in enumerate(config.rewards):
        for name, folder in (("model", reward.model), ("judge", reward.judge)):
            if folder is not None:
                found += model_folder.stored_bytes(folder, f"rewards.{at}.{name}", given) or 0.0
    return found


def trainer_arguments(config: RolloutConfig) -> dict[str, Any]:
    """The recipe's `trainer:`, and what the stage sets beside it.

    A policy with dropout is another one each time it is asked: it samples from none that is trained.
    """
    return {
        "disable_dropout": True,
        **config.trainer,
        "num_generations": config.num_generations,
        "max_completion_length": config.max_completion_length,
        "reward_weights": [reward.weight for reward in config.rewards] or None,
    }
