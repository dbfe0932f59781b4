"""Completions sampled by vLLM, whose weights are those that are trained.

On a CPU vLLM packs the matrices of its linear layers away, so that they can't be written again; here it is told to
leave them as they are. Then new weights are copied to where the old ones lie.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from cordee import files
from cordee.compute.engine import line, prepare
from cordee.errors import Fault, UserError
from posttrain.training.sampling import Sampled, SamplingSettings

TOKENS_AT_ONCE, SEQUENCES_AT_ONCE = 512, 64
"""On a CPU so few that a layer's activations stay in its cache."""
SHARED_TOKENS = 32
"""Completions of one prompt share what was computed of it in pieces of so many tokens; on a CPU vLLM's own are 128."""


@dataclass(frozen=True)
class VllmArguments:
    """How vLLM starts."""

    config: dict[str, Any]
    """The model's `config.json`."""
    dtype: str
    """What it computes in."""
    max_length: int
    """Tokens of the longest prompt with its completion."""
    stops: tuple[int, ...]
    """The ids that end a completion."""
    memory: float
    """The share of a GPU's memory that it takes."""
    processes: int = 1
    """Trainers, each of which has a vLLM of its own."""


def config_json(config: PretrainedConfig, architecture: str) -> dict[str, Any]:
    """The `config.json` of a model that is open."""
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [architecture]}


class Vllm:
    """vLLM in this process; what it holds at first is no model's."""

    def __init__(self, arguments: VllmArguments) -> None:
        """Start it.

        Raises:
            UserError: vLLM does not know the model, or keeps a copy of its experts.
        """
        self.arguments = arguments
        prepare(torch.get_num_threads())
        own = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
        with torch.random.fork_rng(), tempfile.TemporaryDirectory(prefix="cordee-rollouts-") as place:
            files.write_json(Path(place) / "config.json", arguments.config)
            try:
                self.llm = _started(place, arguments)
            except Exception as error:  # vLLM raises no narrower type
                problem = f"vLLM does not serve the model: {line(error)}"
                raise UserError(problem, key="engine", hint="engine: transformers does") from error
        torch.set_grad_enabled(own[0])
        torch.use_deterministic_algorithms(own[1])
        self.is_filled = False
        if not torch.cuda.is_available() and any(self.llm.apply_model(_prepared)):
            problem = "vLLM keeps a packed copy of experts on a CPU, which new weights don't reach"
            raise UserError(problem, key="engine", hint="engine: transformers samples from the model itself")

    def load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Copy weights, named as in a checkpoint, to where vLLM has its own; all of them the first time.

        Raises:
            Fault: vLLM has one that it was not given, or keeps what it computed with others.
        """

        def copy(model: torch.nn.Module) -> list[str]:
            with torch.inference_mode():
                given = model.load_weights(weights)
            return sorted({name for name, _ in model.named_parameters()} - set(given))

        (left,) = self.llm.apply_model(copy)
        if left and not self.is_filled:
            raise Fault(f"vLLM was not given {len(left)} of its weights, {left[0]} first")
        self.is_filled = True
        if not self.llm.reset_prefix_cache():
            raise Fault("vLLM kept its prefix cache")

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: SamplingSettings) -> list[Sampled]:
        """Continue each prompt of token ids `[seq]`, by the seed at its place."""
        from vllm import SamplingParams

        common = {
            "temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k, "min_p": how.min_p,
            "repetition_penalty": how.repetition_penalty, "stop_token_ids": list(self.arguments.stops),
            "ignore_eos": True, "detokenize": False, "logprobs": 0,
        }  # fmt: skip
        asked = [
            SamplingParams(**common, max_tokens=min(how.max_tokens, self.arguments.max_length - len(ids)), seed=seed)
            for ids, seed in zip(prompts, seeds, strict=True)
        ]
        # the trainer's random numbers are not used up; on a CPU vLLM would compile a comparison for seconds
        stance = "default" if torch.cuda.is_available() else "force_eager"
        with torch.random.fork_rng(), torch.compiler.set_stance(stance):
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(ids)} for ids in prompts], asked, use_tqdm=False
            )  # fmt: skip
        return [_sampled(output.outputs[0]) for output in outputs]

    def close(self) -> None:
        """Free what it holds."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        if self.arguments.processes == 1:  # else the process group is the trainers'
            cleanup_dist_env_and_memory()


def _started(place: str, arguments: VllmArguments) -> Any:
    from vllm import LLM

    on_gpu = torch.cuda.is_available()
    more: dict[str, Any] = {"gpu_memory_utilization": arguments.memory}
    if not on_gpu:  # a prompt in one piece: between two, vLLM sets back its random numbers, which it can't on a CPU
        at_once = max(TOKENS_AT_ONCE, arguments.max_length)
        more = {"enable_chunked_prefill": False, "max_num_batched_tokens": at_once}
        more |= {"max_num_seqs": SEQUENCES_AT_ONCE, "block_size": SHARED_TOKENS}
    if arguments.processes > 1:  # vLLM takes the process group that there is
        more["distributed_executor_backend"] = "external_launcher"
    with _plain_matrices():
        return LLM(
            model=place, skip_tokenizer_init=True, load_format="dummy", generation_config="vllm",
            dtype=arguments.dtype, max_model_len=arguments.max_length, enforce_eager=not on_gpu,
            logprobs_mode="processed_logprobs", disable_log_stats=True, trust_remote_code=False, seed=0, **more,
        )  # fmt: skip


@contextlib.contextmanager
def _plain_matrices() -> Iterator[None]:
    """Have vLLM leave the matrices of its linear layers unpacked on a CPU; without effect elsewhere."""
    from vllm.model_executor.layers.linear import LinearBase

    LinearBase._cpu_skip_gemm_dispatch = True  # noqa: SLF001 - the only handle
    try:
        yield
    finally:
        del LinearBase._cpu_skip_gemm_dispatch  # noqa: SLF001


def _prepared(model: torch.nn.Module) -> bool:
    """Have the head compute with its weights and not with a packed copy; returns whether the model has experts."""
    from vllm.lora.utils import is_moe_model
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            module.cpu_linear = torch.nn.functional.linear
    return bool(is_moe_model(model))


def _sampled(output: Any) -> Sampled:
    ids = list(output.token_ids)
    return Sampled(ids, [held[token].logprob for held, token in zip(output.logprobs, ids, strict=True)])
